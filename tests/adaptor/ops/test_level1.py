"""A level-1 GPT equals the level-0 GPT: losses and every gradient, alone and divided."""

import pytest
import torch

from mindspeed.train.config import TrainConfig
from support.ranks import run_ranks

# Megatron compiles a few small functions; eager ones compute the same and start at once.
EAGER = {"TORCHDYNAMO_DISABLE": "1"}
STEPS = 3
BASE = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "seq_length": 24,
    "micro_batch_size": 2,
    "global_batch_size": 4,
}
LLAMA = {
    "normalization": "RMSNorm",
    "swiglu": True,
    "bias_activation_fusion": True,
    "num_query_groups": 2,
}
SP = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
MODELS = {
    "gpt": {},
    "llama": LLAMA,
    "llama_unfused_at_level_0": {**LLAMA, "bias_activation_fusion": False},
    "llama_without_bias": {**LLAMA, "add_bias_linear": False, "rotary_percent": 0.5},
    "qk_norm": {**LLAMA, "qk_layernorm": True},
    "rope_slot": {"apply_rope_fusion": True},
    "learned_positions": {"position_embedding_type": "learned_absolute"},
}


def train(rank, world_size, options, level):
    """Return (losses, gradients by name, activation classes) of this rank."""
    from mindspeed.train.trainer import Trainer

    config = TrainConfig.of(**{**BASE, **options}, optimization_level=level)
    with Trainer(config) as trainer:
        losses = [result.loss for result in trainer.run(STEPS)]
        chunk = trainer.chunks[0]
        grads = {name: p.main_grad.detach().clone() for name, p in chunk.named_parameters()}
        kinds = {type(m).__name__ for m in chunk.modules()}
    return losses, grads, kinds


def both(options, ranks):
    # The rotary slot is what level 1 fills: level 0 must leave the flag off.
    plain = {k: v for k, v in options.items() if k != "apply_rope_fusion"}
    zero = run_ranks(train, ranks, plain, 0, preload="megatron", env=EAGER)
    one = run_ranks(train, ranks, options, 1, preload="megatron", env=EAGER)
    return zip(zero, one, strict=True)


def check(options, ranks):
    for zero, one in both(options, ranks):
        assert "FusedAttention" in one[2]
        assert "FusedAttention" not in zero[2]
        torch.testing.assert_close(one[0], zero[0], rtol=2e-6, atol=2e-6)
        assert one[1].keys() == zero[1].keys()
        for name, grad in one[1].items():
            torch.testing.assert_close(
                grad, zero[1][name], rtol=1e-4, atol=2e-6, msg=lambda text, n=name: f"{n}: {text}"
            )


@pytest.mark.parametrize("model", MODELS)
def test_alone(model):
    check(MODELS[model], 1)


@pytest.mark.megatron014
@pytest.mark.parametrize("model", ["gpt", "llama"])
def test_tensor_and_sequence_parallel(model):
    check({**MODELS[model], **SP}, 2)


def test_recompute():
    check(
        {
            **LLAMA,
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
        },
        1,
    )


def test_bf16_agrees_within_its_rounding():
    (zero, one), *_ = both({**LLAMA, "bf16": True}, 1)
    torch.testing.assert_close(one[0], zero[0], rtol=5e-3, atol=5e-3)


def test_dropout_keeps_megatrons_attention_and_its_numbers():
    check({"attention_dropout": 0.3}, 1)


def test_window_flags_reach_the_layers():
    losses = []
    for flags in ((), (("pre_tokens", 5),), (("pre_tokens", 4), ("next_tokens", 1))):
        (found,) = run_ranks(train, 1, {"feature_flags": flags}, 1, preload="megatron", env=EAGER)
        losses.append(found[0])
    assert losses[0] != losses[1] != losses[2]
