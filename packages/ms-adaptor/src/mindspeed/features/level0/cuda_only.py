"""Settings of Megatron that mean nothing without CUDA and NCCL are refused before anything runs."""

from __future__ import annotations

from mindspeed.patching.records import Feature, Rule


def _needs_cuda(setting: str, flag: str, why: str) -> Rule:
    return Rule(
        kind="forbids",
        left="device != 'cuda'",
        right=setting,
        text=f"{flag} {why}",
        suggestion=f"Leave {flag} out on this device.",
    )


FEATURE = Feature(
    name="level0.cuda_only",
    level=0,
    doc="Refuses CUDA graphs, NCCL buffers and NCCL options on a CPU and an NPU.",
    rules=(
        _needs_cuda("cuda_graph_impl != 'none'", "--cuda-graph-impl", "captures CUDA graphs"),
        _needs_cuda("enable_cuda_graph", "--enable-cuda-graph", "captures CUDA graphs"),
        _needs_cuda("external_cuda_graph", "--external-cuda-graph", "captures CUDA graphs"),
        _needs_cuda("nccl_ub", "--use-nccl-ub", "registers buffers with NCCL"),
        _needs_cuda("use_sharp", "--use-sharp", "asks NCCL for in-network reduction"),
        _needs_cuda(
            "nccl_communicator_config_path",
            "--nccl-communicator-config-path",
            "sets options of NCCL communicators",
        ),
    ),
)
