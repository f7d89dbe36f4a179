"""What excludes packed masters and states on the host: one line a rule, with its code."""

from types import SimpleNamespace

import pytest
import torch

import mindspeed
from mindspeed.features.memory.optim import builder, packed, streamed
from mindspeed.train.args import parse

BF16 = {"bf16": True}
PACKED = {**BF16, "reuse_fp32_param": True}
SWAPPED = {**BF16, "swap_optimizer": True}
EMA = {"optimizer_selection": "fused_ema_adamw"}
TORCHS = {"optimizer_selection": "fused_torch_adamw"}

REFUSED = [
    ({"reuse_fp32_param": True}, "E-M16: --reuse-fp32-param without --bf16"),
    ({"reuse_fp32_param": True, "fp16": True}, "E-M16: --reuse-fp32-param without --bf16"),
    ({**PACKED, "optimizer": "sgd"}, "E-M16: .* other than adam"),
    ({**PACKED, "use_precision_aware_optimizer": True}, "E-M16: .*--use-precision-aware"),
    ({**PACKED, "optimizer_cpu_offload": True}, "E-M16: .*--optimizer-cpu-offload"),
    ({**PACKED, "use_torch_fsdp2": True}, "E-M16: .*--use-torch-fsdp2"),
    ({**PACKED, "use_megatron_fsdp": True}, "E-M16: .*--use-megatron-fsdp"),
    ({**PACKED, "fp8_param_gather": True}, "E-M16: .*--fp8-param-gather"),
    ({**PACKED, "qk_clip": True}, "E-M16: .*--qk-clip"),
    ({**PACKED, **TORCHS}, "E-M16: .*--optimizer-selection"),
    ({**PACKED, **EMA}, "E-M16: .*averages need fp32"),
    ({**PACKED, "swap_optimizer": True}, "E-M15: .*both own the masters"),
    ({"swap_optimizer": True}, "E-M15: --swap-optimizer without --bf16 or --fp16"),
    ({**SWAPPED, "optimizer": "sgd"}, "E-M15: .* other than adam"),
    ({**SWAPPED, "swap_optimizer_times": -1}, "E-M15: .*must be 0 or more"),
    ({**BF16, "swap_optimizer_times": 4}, "acts only with --swap-optimizer"),
    ({**SWAPPED, "use_precision_aware_optimizer": True}, "E-M15: .*--use-precision-aware"),
    ({**SWAPPED, "optimizer_cpu_offload": True}, "E-M15: .*--optimizer-cpu-offload"),
    ({**SWAPPED, "use_torch_fsdp2": True}, "E-M15: .*--use-torch-fsdp2"),
    ({**SWAPPED, "use_megatron_fsdp": True}, "E-M15: .*--use-megatron-fsdp"),
    ({**SWAPPED, "fp8_param_gather": True}, "E-M15: .*--fp8-param-gather"),
    ({**SWAPPED, "qk_clip": True}, "E-M15: .*--qk-clip"),
    ({**SWAPPED, **TORCHS}, "E-M15: .*--optimizer-selection"),
    ({**SWAPPED, **EMA}, "E-M15: .*hold no averages"),
]


@pytest.mark.parametrize(("values", "words"), REFUSED)
def test_refused_with_its_code(values, words):
    with pytest.raises(mindspeed.PlanError, match=words):
        mindspeed.plan(values, level=2)


@pytest.mark.parametrize("values", [PACKED, SWAPPED], ids=["packed", "swapped"])
def test_below_level_2_it_is_an_error(values):
    with pytest.raises(mindspeed.PlanError, match="optimization-level 2"):
        mindspeed.plan(values, level=1)


@pytest.mark.parametrize(
    ("values", "wrapper"),
    [
        (PACKED, "wrap_rna"),
        ({**PACKED, "npu_deterministic": True}, "wrap_rne"),
        ({**PACKED, "deterministic_mode": True}, "wrap_rne"),
        ({**SWAPPED, "swap_optimizer_times": 0}, "wrap_streamed"),
        ({"fp16": True, "swap_optimizer": True}, "wrap_streamed"),
    ],
)
def test_one_wrapper_below_level_1s(values, wrapper):
    """Megatron's builder is called by the innermost; level 1 finds no Adam of torch's any more."""
    plan = mindspeed.plan(values, level=2)
    builders = [s.patch for s in plan.acting if "_based_on_param_groups" in s.patch.path]
    builders.sort(key=lambda patch: patch.order)
    assert [p.value.split(":")[1] for p in builders] == [wrapper, "wrap_fused"]


def test_the_command_line_gives_them():
    words = ["--bf16", "--swap-optimizer", "--swap-optimizer-times", "3"]
    config = parse(words).config
    assert dict(config.feature_flags) == {"swap_optimizer": True, "swap_optimizer_times": 3}


def test_times():
    config = SimpleNamespace(swap_optimizer_times=5)
    assert builder.times_of(config) == 5
    assert builder.times_of(SimpleNamespace()) == streamed.TIMES


@pytest.mark.parametrize("wrap", [builder.wrap_rna, builder.wrap_streamed])
def test_other_optimizers_stay_away(wrap):
    other = torch.optim.SGD([torch.zeros(2)])
    with pytest.raises(ValueError, match=r"E-M1[56]: .*torch\.optim\.sgd\.SGD"):
        wrap(lambda config: SimpleNamespace(optimizer=other))(SimpleNamespace())
    made = SimpleNamespace(optimizer=None)
    assert wrap(lambda config: made)(SimpleNamespace()) is made  # a rank without parameters


@pytest.mark.parametrize("wrap", [builder.wrap_rna, builder.wrap_streamed])
def test_fp32_parameters_are_refused(wrap):
    p = torch.zeros(2)
    made = SimpleNamespace(
        optimizer=torch.optim.AdamW([p]), float16_groups=[[]], fp32_from_fp32_groups=[[p]]
    )
    with pytest.raises(ValueError, match=r"E-M1[56]: .*1 of the model"):
        wrap(lambda config: made)(SimpleNamespace())


def test_advice():
    shared = SimpleNamespace(use_distributed_optimizer=True, swap_optimizer_times=8)
    assert "divided by" in packed.advise(shared)
    assert "2 bytes a weight;" in packed.advise(SimpleNamespace())
    assert "2/8" in streamed.advise(shared)
    assert "1/1" in streamed.advise(SimpleNamespace(swap_optimizer_times=0))
