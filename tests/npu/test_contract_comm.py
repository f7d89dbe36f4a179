"""The products with communication against the torch_npu wheel: schemas, shapes, groups of a name.

No rank exists but this one, and nothing is sent: the group's collectives are torch's fakes.
"""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ms_ops.testing.cases.comm import OPERATORS
from ms_ops.testing.comm import forward_and_backward
from ms_ops.testing.npu.comm import named_groups
from support import npu_contract, npu_stubs
from support.comm_ranks import ON_NPU, World
from support.fake import fake_world
from support.mutation import Mutation

CALLED = {
    "matmul_all_reduce": {"npu_mm_all_reduce_base"},
    "all_gather_matmul": {"npu_all_gather_base_mm", "npu_mm_reduce_scatter_base"},
    "matmul_reduce_scatter": {"npu_mm_reduce_scatter_base", "npu_all_gather_base_mm"},
    "all_gather_matmul_reduce_scatter": {"npu_all_gather_base_mm"},
    "matmul_all_reduce_add_rms_norm": {
        "npu_mm_all_reduce_base",
        "npu_add_rms_norm",
        "npu_rms_norm_backward",
    },
    "matmul_all_reduce_add_rms_norm_": {"npu_mm_all_reduce_base", "npu_add_rms_norm"},
    "grouped_matmul_all_reduce": {"npu_grouped_matmul"},
}
RANK = 1


@pytest.fixture(scope="module", autouse=True)
def _torch_npu(tmp_path_factory):
    npu_stubs.import_torch_npu(tmp_path_factory.mktemp("stubs"))


def run_samples(op, dtype):
    """Run all samples of an operator on fake NPU tensors; return torch_npu's operators used."""
    contract = npu_contract.ContractMode()
    with fake_world(4, RANK):
        world = World(RANK, 4)
        with named_groups(*world.all_groups()):
            test = OPERATORS[op]
            sizes, groups = world.of(test)[0]
            for sample in test.samples(sizes, dtype, "cpu"):
                with FakeTensorMode():
                    tensors = {k: on_npu(t) for k, t in sample.ranks[RANK].items()}
                    with contract:
                        forward_and_backward(test, tensors, sample.options, groups)
    names = (name.partition("::") for name in contract.called)
    return {name for library, _, name in names if library == "npu"}


def on_npu(tensor):
    if tensor is None:
        return None
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="npu")


@pytest.mark.parametrize("op", ON_NPU)
def test_calls_are_accepted_and_give_what_our_fakes_promise(op):
    def check():
        assert run_samples(op, torch.bfloat16) == CALLED[op]

    failure = npu_contract.in_child(check)
    assert not failure, failure


NPU = "ms_ops.fused_comm.npu"
MUTANTS = [
    ("all_gather_matmul", Mutation("keyword", f"{NPU}:_gathered", "gather_output", "keep_output")),
    ("matmul_reduce_scatter", Mutation("order", f"{NPU}:_scattered", "name, size,", "size, name,")),
    ("matmul_all_reduce", Mutation("ranks", f"{NPU}:_summed", "name, reduce_op", "name, 4, op")),
]


@pytest.mark.parametrize(("op", "mutation"), MUTANTS, ids=[m.name for _, m in MUTANTS])
def test_a_wrong_call_is_noticed(op, mutation):
    with mutation.applied():
        assert npu_contract.in_child(lambda: run_samples(op, torch.bfloat16))
