"""Parameters that FSDP2 divides among ranks: each rank's part is packed, or moves to the host."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from ms_memory import device
from ms_memory.errors import MemoryFeatureError
from ms_memory.optim import PackedAdamW, Streamed
from ms_memory.optim.shards import divided_as, local, same_memory
from support.ranks import run_ranks


def model(dtype):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 5, bias=False)).to(dtype)


def divided(dtype):
    from torch.distributed.fsdp import fully_shard

    whole = model(dtype)
    fully_shard(whole)
    return whole


def backward(module, step):
    """The same samples at every rank, so that means of gradients are those of one process."""
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(step))
    module(x.to(next(module.parameters()).dtype)).float().square().mean().backward()


def train(module, optimizer, steps, first=0):
    for step in range(first, first + steps):
        backward(module, step)
        optimizer.step()
        optimizer.zero_grad()


def same(parts, wholes):
    for part, whole in zip(parts, wholes, strict=True):
        assert isinstance(part, DTensor)
        assert torch.equal(part.full_tensor(), whole)


def check_packed():
    one, many = model(torch.bfloat16), divided(torch.bfloat16)
    plain = PackedAdamW(one.parameters(), 1e-2, rounding="rne")
    packed = PackedAdamW(many.parameters(), 1e-2, rounding="rne")
    for trained in ((one, plain), (many, packed)):
        train(*trained, 3)
    same(many.parameters(), one.parameters())
    own = sum(local(p).numel() for p in many.parameters())
    assert packed.nbytes() == own * (2 + 4 + 4) + 8 * len(packed.packed[0]._ties)
    saved = copy.deepcopy(packed.state_dict())
    wanted = plain.state_dict()["state"]
    for number, state in saved["state"].items():
        for name in ("master", "exp_avg", "exp_avg_sq"):
            same([state[name]], [wanted[number][name]])
    train(one, plain, 1, first=3)
    for p in many.parameters():
        nn.init.zeros_(p)
    with pytest.raises(MemoryFeatureError, match="E-M40"):
        packed.state_dict()
    packed.load_state_dict(saved)
    train(many, packed, 1, first=3)
    same(many.parameters(), one.parameters())


def check_streamed():
    one, many = model(torch.float32), divided(torch.float32)
    inner = torch.optim.AdamW(many.parameters(), 1e-2, foreach=False)
    reference = torch.optim.AdamW(one.parameters(), 1e-2, foreach=False)
    sim = device.sim(schedule="late")
    streamed = Streamed(inner, groups=2, device=sim)
    for trained in ((one, reference), (many, streamed)):
        train(*trained, 3)
    same(many.parameters(), one.parameters())
    own = sum(local(p).numel() for p in many.parameters())
    assert streamed.host_nbytes() == 8 * own
    saved = copy.deepcopy(streamed.state_dict())
    for number, state in saved["state"].items():
        same([state["exp_avg"]], [reference.state_dict()["state"][number]["exp_avg"]])
    for trained in ((one, reference), (many, streamed)):
        train(*trained, 1, first=3)
    before = [p.full_tensor() for p in many.parameters()]
    streamed.load_state_dict(saved)
    assert streamed.host_nbytes() == 8 * own
    same(many.parameters(), before)
    same(
        [streamed.state_dict()["state"][0]["exp_avg"]], [saved["state"][0]["exp_avg"].full_tensor()]
    )


def check_layouts(rank):
    """A part on another kind of memory than its mesh keeps the layout, and its own memory."""
    (p, *_) = divided(torch.bfloat16).parameters()
    part = torch.empty(local(p).shape, device="meta")
    made = divided_as(part, p)
    assert made.placements == p.placements
    assert made.shape == p.shape
    assert local(made).device.type == "meta"
    here = torch.zeros(local(p).shape)
    assert same_memory(local(divided_as(here, p)), here)
    assert divided_as(here, here) is here


def check(rank, world_size):
    check_packed()
    check_streamed()
    check_layouts(rank)
    dist.barrier()


def test_fsdp2_parameters():
    run_ranks(check, 2)
