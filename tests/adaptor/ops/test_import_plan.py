"""What the import has applied stays in force when a configuration brings a higher level."""

import pytest

from mindspeed.patching.plan import plan


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"moe_grouped_gemm": True, "gemm_gradient_accumulation_fusion": True},
        {"position_embedding_type": "alibi", "swiglu": True, "cross_entropy_loss_fusion": True},
    ],
)
def test_higher_levels_contain_what_the_import_has_applied_already(config):
    applied = {step.patch for step in plan(None, level=0, device="cpu", megatron="0.16.1").acting}
    for level in (1, 2):
        later = plan(config, level=level, device="cpu", megatron="0.16.1")
        assert applied <= {step.patch for step in later.acting}
