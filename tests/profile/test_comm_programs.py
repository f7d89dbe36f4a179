"""CommMeter in whole programs: groups, phases, modules, what wraps communication, bad input."""

import json
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional

from ms_profile import tap
from ms_profile.comm import CommMeter, Transfer, register
from support.fake import fake_world
from support.ranks import run_ranks


def whole_programs(rank, world_size):
    """Groups, phases, autograd, DDP, objects, nesting, the matrix."""
    warnings.simplefilter("ignore")
    found = {}
    pairs = [dist.new_group(ranks, group_desc="PAIR") for ranks in ([0, 2], [1, 3])]
    pair = pairs[rank % 2]
    plain = dist.new_group([3, 2, 1, 0])

    with CommMeter() as outer, CommMeter() as inner:
        dist.all_reduce(torch.ones(4), group=pair)
        with tap.unmetered():
            dist.all_reduce(torch.ones(4), group=pair)
        dist.barrier(group=plain)
    dist.all_reduce(torch.ones(4), group=pair)
    assert inner.calls == outer.calls
    found["groups"] = [(c.op, c.group, c.ranks, c.wire_bytes, dict(c.to)) for c in inner.calls]
    with pytest.raises(RuntimeError, match="is on already"), inner, inner:
        pass

    with CommMeter() as meter:
        x = torch.ones(8, requires_grad=True)
        functional.all_to_all_single_autograd(
            x, [2] * 4, [2] * 4, dist.group.WORLD
        ).sum().backward()
        with torch.no_grad():
            dist.all_reduce(torch.ones(2))
    found["autograd"] = [(c.op, c.bytes, c.phase) for c in meter.calls]

    with CommMeter() as meter:
        dist.all_gather_object([None] * world_size, "payload")
    found["objects"] = [(c.op, c.dtype) for c in meter.calls]

    linear = torch.nn.Linear(4, 4)
    model = torch.nn.parallel.DistributedDataParallel(linear)
    with CommMeter() as meter:
        model(torch.ones(2, 4)).sum().backward()
    found["ddp"] = [(c.op, c.bytes, c.phase) for c in meter.calls]
    assert linear.weight.grad is not None

    with CommMeter() as meter:
        if rank == 0:
            dist.send(torch.ones(3), 3)
        if rank == 3:
            dist.recv(torch.ones(3), 0)
        dist.broadcast(torch.ones(5), 1)
    found["matrix"] = meter.gather()
    assert meter.matrix()[rank] == found["matrix"][rank]
    assert len(meter.calls) == 1 + (rank in (0, 3))
    found["json"] = json.dumps(meter.as_dict())
    return found


def test_groups_phases_and_whole_programs():
    ranks = run_ranks(whole_programs, 4)
    for rank, found in enumerate(ranks):
        peer = (rank + 2) % 4
        pair = tuple(sorted((rank, peer)))
        assert found["groups"][0] == ("all_reduce", "PAIR", pair, 16, {peer: 16})
        # A group without a description keeps the name that torch numbers it with.
        op, name, members, wire, _ = found["groups"][1]
        assert (op, members, wire, name.isdigit()) == ("barrier", (0, 1, 2, 3), 0, True)
        assert len(found["groups"]) == 2
        # The functional form and the autograd form inside it are one call each way.
        assert found["autograd"] == [
            ("all_to_all", 32, "forward"),
            ("all_to_all", 32, "backward"),
            ("all_reduce", 8, "other"),
        ]
        assert [op for op, _ in found["objects"]] == ["all_gather", "all_gather"]
        assert found["ddp"] == [("all_reduce", 4 * (16 + 4), "backward")]
        assert found["matrix"] == [[0, 0, 0, 12], [20, 0, 20, 20], [0] * 4, [0] * 4]
        data = json.loads(found["json"])
        assert (data["kind"], data["version"], data["rank"]) == ("comm", 1, rank)
        assert data["world_size"] == 4
        assert " ".join(data["calls"][0]) == (
            "index op group ranks bytes wire_bytes to dtype phase module"
        )


class Reduced(torch.nn.Module):
    def forward(self, x):
        dist.all_reduce(x)
        return x


def on_one_rank(rank, world_size):
    meter = CommMeter()
    model = torch.nn.Sequential(torch.nn.Identity(), Reduced())
    for _ in range(2):
        with meter:
            model(torch.ones(3, 4))
            dist.all_reduce(torch.ones(2, dtype=torch.float16))
    rows = meter.table()
    sums = meter.total(of="bytes"), meter.total(op="all_reduce", of="calls"), meter.total()
    assert sums == (48 + 4, 2, 0)
    assert meter.total(group="nobody", of="bytes") == meter.total(phase="backward") == 0
    return rows, [call.module for call in meter.calls]


def test_table_totals_and_modules():
    rows, modules = run_ranks(on_one_rank, 1)[0]
    assert rows == [
        {
            "group": "default_pg",
            "op": "all_reduce",
            "phase": "forward",
            "calls": 2,
            "bytes": 52,
            "wire_bytes": 0,
        }
    ]
    assert modules == ["Sequential.1", ""]


class Mean(torch.autograd.Function):
    """Applies itself on the way back, as Megatron's all-to-all does."""

    @staticmethod
    def forward(ctx, x):
        y = x.clone()
        dist.all_reduce(y)
        return y

    @staticmethod
    def backward(ctx, grad):
        return Mean.apply(grad)


class Block(torch.nn.Linear):
    def forward(self, x):
        return Mean.apply(super().forward(x)).sin()


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_recomputed_communication_is_told_from_backward(reentrant):
    from torch.utils.checkpoint import checkpoint

    model = Block(4, 4)
    x = torch.ones(2, 4, requires_grad=True)
    with fake_world(2), CommMeter() as meter:
        out = model(x) if reentrant is None else checkpoint(model, x, use_reentrant=reentrant)
        out.sum().backward()
    again = [] if reentrant is None else [("recompute", "Block")]
    found = [(call.phase, call.module) for call in meter.calls]
    assert found == [("forward", "Block"), *again, ("backward", "Block")]


def unknown_operator(rank, world_size):
    library = torch.library.Library("comm_test", "FRAGMENT")
    library.define("fused(Tensor x, str group_name) -> Tensor")
    library.impl("fused", lambda x, group_name: x * 2, "CPU")
    fused = torch.ops.comm_test.fused
    name = dist.group.WORLD.group_name
    with pytest.raises(LookupError, match="comm_test::fused takes a process group"), CommMeter():
        fused(torch.ones(4), name)
    assert torch.equal(fused(torch.ones(4), name), torch.full((4,), 2.0))

    def reader(args, me, size):
        yield Transfer("all_reduce", args["x"].nbytes, {}, "float32")

    register("comm_test::fused", reader)
    with CommMeter() as meter:
        fused(torch.ones(4), group_name=name)
    assert [(call.op, call.bytes) for call in meter.calls] == [("all_reduce", 16)]
    with pytest.raises(ValueError, match="has a reader already"):
        register("comm_test::fused", reader)


def test_an_unknown_operator_with_a_group_is_an_error():
    run_ranks(unknown_operator, 1)


def test_dtensor():
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

    with fake_world(4):
        mesh = init_device_mesh("cpu", (4,))
        sharded = distribute_tensor(torch.ones(8, 4), mesh, [Shard(0)])
        with CommMeter() as meter:
            (sharded.redistribute(mesh, [Replicate()]) + 1).to_local()
    found = [(c.op, c.bytes, c.wire_bytes, c.phase) for c in meter.calls]
    assert found == [("all_gather", 4 * 8 * 4, 4 * 3 * 2 * 4, "forward")]


def test_nothing_is_counted_of_a_program_without_communication():
    with CommMeter() as meter:
        torch.ones(3) * 2
    assert meter.calls == ()
    assert meter.matrix() == [[0]]
    assert meter.gather() == [[0]]
    assert meter.as_dict()["calls"] == []
