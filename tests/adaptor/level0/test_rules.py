"""Settings that level 0 refuses, with what to do instead, and where it lets them pass."""

import pytest

import mindspeed

CUDA_ONLY = {
    "--cuda-graph-impl": {"cuda_graph_impl": "local"},
    "--enable-cuda-graph": {"enable_cuda_graph": True},
    "--external-cuda-graph": {"external_cuda_graph": True},
    "--use-nccl-ub": {"nccl_ub": True},
    "--use-sharp": {"use_sharp": True},
    "--nccl-communicator-config-path": {"nccl_communicator_config_path": "nccl.yaml"},
}
MEGATRON = "0.16.1"


def problems(config, device="cpu"):
    try:
        mindspeed.plan(config, level=0, device=device, megatron=MEGATRON)
    except mindspeed.PlanError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("flag", CUDA_ONLY)
def test_what_needs_cuda_is_refused_elsewhere(flag):
    assert f"Leave {flag} out on this device" in problems(CUDA_ONLY[flag])
    assert flag in problems(CUDA_ONLY[flag], "npu")
    assert not problems(CUDA_ONLY[flag], "cuda")


def test_a_virtual_pipeline_of_two_stages_must_not_batch_its_messages():
    two = {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}
    batched = {**two, "overlap_p2p_comm": False}
    assert "overlap_p2p_comm=True" in problems(batched)
    assert "overlap_p2p_comm=True" in problems(batched, "cuda")
    assert not problems({**two, "overlap_p2p_comm": True})
    assert not problems({**batched, "pipeline_model_parallel_size": 4})


def test_experts_with_a_bias_are_refused_without_transformer_engine():
    experts = {"num_experts": 4, "add_bias_linear": True}
    assert "--disable-bias-linear" in problems(experts)
    assert not problems(experts, "cuda")
    assert not problems({**experts, "add_bias_linear": False})


def test_all_problems_are_told_at_once():
    text = problems({**CUDA_ONLY["--use-sharp"], **CUDA_ONLY["--use-nccl-ub"]})
    assert "--use-sharp" in text
    assert "--use-nccl-ub" in text
