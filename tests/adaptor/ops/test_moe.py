"""Megatron's permutation and weight-gradient accumulation on ms_ops against its own."""

from types import SimpleNamespace

import pytest
import torch

from mindspeed.features.ops import grouped_matmul, moe_permute, weight_gradient
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


def train(rank, world_size, options, level, steps=2):
    from mindspeed.train.trainer import Trainer

    model = {
        "num_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "seq_length": 24,
        "micro_batch_size": 2,
        "global_batch_size": 8,
        "num_experts": 4,
        "moe_token_dispatcher_type": "alltoall",
        "expert_model_parallel_size": 2,
        "add_bias_linear": False,
        "optimization_level": level,
    }
    config = TrainConfig.of(**{**model, **options})
    with Trainer(config) as trainer:
        losses = [result.loss for result in trainer.run(steps)]
        parameters = trainer.chunks[0].named_parameters()
        grads = {name: p.main_grad.detach().clone() for name, p in parameters}
        marks = sum(
            getattr(p, "grad_added_to_main_grad", False) for p in trainer.chunks[0].parameters()
        )
    return losses, grads, marks


GROUPED = {
    "num_layers": 1,
    "bf16": True,
    "swiglu": True,
    "moe_grouped_gemm": True,
    "expert_model_parallel_size": 1,
    "global_batch_size": 2,
}


def train_grouped(rank, world_size):
    """Level 0, level 1, and level 1 with the gradients added in the products."""
    added = {"feature_flags": (("gemm_gradient_accumulation_fusion", True),)}
    cases = ((GROUPED, 0), (GROUPED, 1), ({**GROUPED, **added}, 1))
    return [train(rank, world_size, *case, steps=1) for case in cases]


@pytest.mark.megatron014
def test_grouped_experts_add_their_gradients_unrounded():
    (zero, one, added), *_ = run_ranks(train_grouped, 1, preload="megatron", env=EAGER)
    assert (zero[2], one[2], added[2]) == (0, 0, 2)
    for ours in (one, added):
        torch.testing.assert_close(ours[0], zero[0], rtol=5e-3, atol=5e-3)
    names = [name for name in added[1] if "experts.weight" in name]
    assert len(names) == 2
    for name in names:
        torch.testing.assert_close(added[1][name], one[1][name], rtol=4e-3, atol=1e-6)
        # Rounded to bf16 before it is added, a gradient nearly never equals the unrounded one.
        assert (added[1][name] != one[1][name]).float().mean() > 0.5


def test_only_weights_of_experts_take_gradients_in_place():
    from mindspeed.features.ops.grouped_matmul_function import accumulating, product

    x, sizes = torch.randn(4, 6), torch.tensor([1, 3])
    parameter = torch.nn.Parameter(torch.randn(6, 10))
    for wrong in (torch.randn(2, 6, 5, requires_grad=True), parameter.view(2, 6, 5)):
        with pytest.raises(ValueError, match="no view of a parameter with main_grad"):
            accumulating(x, wrong, sizes)
    with torch.no_grad():
        view = parameter.view(2, 6, 5)
        assert torch.equal(accumulating(x, view, sizes), product(x, view, sizes))
    parameter.main_grad = torch.ones(6, 10)
    parameter.grad_added_to_main_grad, parameter.zero_out_wgrad = False, True
    y = accumulating(x, parameter.view(2, 6, 5), sizes)
    y.backward(torch.ones_like(y))
    assert parameter.grad_added_to_main_grad
    assert parameter.grad.count_nonzero() == 0
    want = torch.stack([x[:1].t() @ torch.ones(1, 5), x[1:].t() @ torch.ones(3, 5)])
    torch.testing.assert_close(parameter.main_grad.view(2, 6, 5), 1 + want)


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
        (grouped_matmul, {}, "one by one"),
        (grouped_matmul, {"moe_grouped_gemm": True}, "rounded, then added"),
        (
            grouped_matmul,
            {"moe_grouped_gemm": True, "gemm_gradient_accumulation_fusion": True},
            "none is allocated",
        ),
        (weight_gradient, {}, "is off"),
        (weight_gradient, {"gradient_accumulation_fusion": True, "bf16": True}, "unrounded"),
        (weight_gradient, {"gradient_accumulation_fusion": True}, "no gradient is allocated"),
    ],
)
def test_advice(module, options, words):
    assert words in module.advise(SimpleNamespace(**options))
    assert module.FEATURE.advise == f"{module.__name__}:advise"
