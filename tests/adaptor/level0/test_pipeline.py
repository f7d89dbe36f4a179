"""Overlapped pipeline messages survive that their tensor is freed as soon as they are started."""

import time

import pytest
import torch
import torch.distributed as dist

from support.ranks import rank_outcomes

SIZE = 1 << 20  # more than a socket buffers, so the send is under way while the memory is freed


def frees_after_send(rank, world_size, repaired):
    from megatron.core.pipeline_parallel.p2p_communication import _p2p_ops

    from mindspeed.features.level0.pipeline import wrap_p2p_ops

    send = wrap_p2p_ops(_p2p_ops) if repaired else _p2p_ops
    nothing = dict.fromkeys(
        ["tensor_send_prev", "tensor_recv_prev", "tensor_send_next", "tensor_recv_next"]
    )
    place = {"group": dist.group.WORLD, "prev_pipeline_rank": 1 - rank}
    place["next_pipeline_rank"] = 1 - rank
    if rank == 0:
        output = torch.full((SIZE,), 7.0)
        requests = send(**{**nothing, "tensor_send_next": output}, **place)
        output.data = torch.empty(1)  # what deallocate_pipeline_outputs does
        reused = [torch.zeros(SIZE) for _ in range(8)]
        time.sleep(0.3)
        requests["send_next"].wait()
        return len(reused)
    received = torch.empty(SIZE)
    time.sleep(0.3)
    send(**{**nothing, "tensor_recv_prev": received}, **place)["recv_prev"].wait()
    return bool((received == 7.0).all())


@pytest.mark.parametrize("repaired", [True, False])
def test_freed_output_arrives_whole_only_with_the_repair(repaired):
    outcomes = rank_outcomes(frees_after_send, 2, repaired, preload="megatron", timeout=20)
    assert (outcomes[1].status == "ok" and outcomes[1].value) is repaired
