"""Ranks forked from a process that holds Megatron under the device layer."""

import sys
import time

import torch
import torch.distributed as dist

from support.ranks import run_ranks


def uses_megatron(rank, world_size):
    from megatron.core import parallel_state, tensor_parallel

    from mindspeed import device

    parallel_state.initialize_model_parallel(tensor_model_parallel_size=world_size)
    x = torch.full((2,), float(rank + 1), requires_grad=True)
    y = tensor_parallel.reduce_from_tensor_model_parallel_region(x)
    parallel_state.destroy_model_parallel()
    return device.current().type, y.tolist()


def processor_seconds(rank, world_size):
    uses_megatron(rank, world_size)
    return time.process_time()


def sees_plain_torch(rank, world_size):
    return torch.cuda.is_available(), dist.get_backend()


def test_megatron_runs_in_ranks_and_never_reaches_the_test_process():
    before = {name for name in sys.modules if name.split(".")[0] == "megatron"}
    assert run_ranks(uses_megatron, 2, preload="megatron") == [("cpu", [3.0, 3.0])] * 2
    after = {name for name in sys.modules if name.split(".")[0] == "megatron"}
    assert after == before


def test_ranks_do_not_import_megatron_again():
    """Their own processor seconds, which other load on the machine does not change much."""
    assert max(run_ranks(processor_seconds, 2, preload="megatron")) < 1.0  # the import takes 3 s


def test_torch_is_itself_in_these_ranks():
    assert run_ranks(sees_plain_torch, 1, preload="megatron") == [(False, "gloo")]
