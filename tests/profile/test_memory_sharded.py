"""MemoryMeter under fully sharded data parallelism, which empties and refills storages itself."""

import torch
from torch import nn

from ms_profile.memory import MemoryMeter
from support.ranks import run_ranks

N, H, F = 32, 64, 256


def sharded_step(rank, world_size):
    """Return marks, peak and leaks of a second training step."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (world_size,))
    model = nn.Sequential(nn.Linear(H, F), nn.GELU(), nn.Linear(F, H))
    for layer in (model[0], model[2], model):
        fully_shard(layer, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters())
    x = torch.randn(N, H)

    def step(meter):
        loss = model(x).sum()
        meter.mark("forward", outputs=loss)
        loss.backward()
        meter.mark("backward")
        optimizer.step()
        optimizer.zero_grad()
        meter.mark("step")

    meter = MemoryMeter(model, optimizer, x)
    for _ in range(2):
        with meter:
            step(meter)
            leaks = meter.leaks()
    return [mark.by_kind for mark in meter.marks], meter.peak, leaks


def test_shards_are_counted_and_gathered_weights_come_and_go():
    shard = 4 * (2 * H * F + H + F) // 2
    constant = {"parameter": shard, "optimizer": 2 * shard + 4 * 4, "input": 4 * N * H}
    whole = 4 * 2 * H * F
    for (forward, backward, step), peak, leaks in run_ranks(sharded_step, 2):
        for mark in (forward, backward, step):
            # The loss, and gathered weights as long as the communication's thread holds them.
            assert mark.pop("other") >= 4
        assert forward == {**constant, "activation": 2 * 4 * N * F}
        assert backward == {**constant, "gradient": shard}
        assert step == constant
        assert [leak for leak in leaks if leak.kind == "activation"] == []
        assert peak.exact
        assert peak.phase == "backward"
        assert sum(peak.snapshot.by_kind.values()) == peak.nbytes
        assert peak.nbytes > sum(constant.values()) + whole // 2
