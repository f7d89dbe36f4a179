"""Megatron's permutation and weight-gradient accumulation on ms_ops against its own."""

from types import SimpleNamespace

import pytest
import torch

from mindspeed.features.ops import moe_permute, weight_gradient
from mindspeed.features.ops.moe_permute_function import chunk_rows
from mindspeed.train.config import TrainConfig
from support.ranks import run_ranks

EAGER = {"TORCHDYNAMO_DISABLE": "1"}


def tensors(result):
    return [t.detach() for t in result if t is not None]


def both_ways(tokens, routing_map, probs, rows, padded):
    """Permute, weight and restore with Megatron's unfused functions and with ours."""
    from megatron.core.transformer.moe import moe_utils

    from mindspeed.features.ops import moe_permute_function as ours

    permute = ours.wrap_permute(moe_utils.permute)
    unpermute = ours.wrap_unpermute(moe_utils.unpermute)
    results = []
    for fused in (False, True):
        x, weights = tokens.clone().requires_grad_(), probs.clone().requires_grad_()
        out, moved, order = permute(x, routing_map, weights, rows, fused, padded)
        back = unpermute(out, order, x.shape, weights, routing_map, fused, padded)
        plain = unpermute(out, order, x.shape, None, routing_map, fused, padded)
        torch.manual_seed(1)
        total = sum((t * torch.randn_like(t)).sum() for t in (out, moved, back, plain))
        grads = torch.autograd.grad(total, (x, weights))
        results.append(tensors([out, moved, back, plain, *grads]))
    return results


def permutations(rank, world_size):
    torch.manual_seed(0)
    tokens, probs = torch.randn(12, 5), torch.rand(12, 4)
    top2 = torch.zeros(12, 4, dtype=torch.bool).scatter_(1, probs.topk(2, 1).indices, True)
    any_number = probs < 0.4
    # As Megatron makes it for a fixed capacity: each column has as many entries.
    even = torch.zeros(12, 4, dtype=torch.bool).scatter_(0, probs.topk(5, 0).indices, True)
    return [
        both_ways(tokens, top2, probs, 24, False),
        both_ways(tokens, any_number, probs, None, False),
        both_ways(tokens, even, probs, 20, True),
    ]


def test_fused_permutation_equals_megatrons():
    for theirs, ours in run_ranks(permutations, 1, preload="megatron")[0]:
        assert torch.equal(ours[0], theirs[0])
        assert torch.equal(ours[1], theirs[1])
        for mine, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


def test_chunks_change_places_without_reading_sizes():
    sizes, order = torch.tensor([3, 0, 2, 4]), torch.tensor([2, 0, 3, 1])
    rows = torch.arange(9)
    chunks = rows.split(sizes.tolist())
    want = torch.cat([chunks[i] for i in order.tolist()])
    assert torch.equal(chunk_rows(sizes, order, 9), want)


def train(rank, world_size, options, level):
    from mindspeed.train.trainer import Trainer

    config = TrainConfig.of(
        num_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        seq_length=24,
        micro_batch_size=2,
        global_batch_size=8,
        num_experts=4,
        moe_token_dispatcher_type="alltoall",
        expert_model_parallel_size=2,
        add_bias_linear=False,
        optimization_level=level,
        **options,
    )
    with Trainer(config) as trainer:
        losses = [result.loss for result in trainer.run(2)]
        parameters = trainer.chunks[0].named_parameters()
        grads = {name: p.main_grad.detach().clone() for name, p in parameters}
        marks = sum(
            getattr(p, "grad_added_to_main_grad", False) for p in trainer.chunks[0].parameters()
        )
    return losses, grads, marks


def test_a_model_with_experts_trains_as_without():
    fused = {"moe_permute_fusion": True, "gradient_accumulation_fusion": True}
    plain = run_ranks(train, 2, {}, 0, preload="megatron", env=EAGER)
    ours = run_ranks(train, 2, fused, 1, preload="megatron", env=EAGER)
    for zero, one in zip(plain, ours, strict=True):
        assert one[2] > 0
        assert zero[2] == 0
        torch.testing.assert_close(one[0], zero[0], rtol=2e-6, atol=2e-6)
        for name, grad in one[1].items():
            torch.testing.assert_close(grad, zero[1][name], rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize(
    ("module", "options", "words"),
    [
        (moe_permute, {}, "no experts"),
        (moe_permute, {"num_experts": 4}, "turn it on"),
        (moe_permute, {"num_experts": 4, "moe_permute_fusion": True}, "pays with weights"),
        (weight_gradient, {}, "is off"),
        (weight_gradient, {"gradient_accumulation_fusion": True, "bf16": True}, "unrounded"),
        (weight_gradient, {"gradient_accumulation_fusion": True}, "no gradient is allocated"),
    ],
)
def test_advice(module, options, words):
    assert words in module.advise(SimpleNamespace(**options))
    assert module.FEATURE.advise == f"{module.__name__}:advise"
