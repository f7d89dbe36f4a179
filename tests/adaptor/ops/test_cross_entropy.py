"""Level 1's cross entropy of a divided vocabulary against torch's of the whole one."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from mindspeed.features.ops import cross_entropy
from mindspeed.features.ops import cross_entropy_function as ours
from ms_profile import MemoryMeter
from support.ranks import run_ranks

EAGER = {"TORCHDYNAMO_DISABLE": "1"}
ALONE = SimpleNamespace(size=lambda: 1, rank=lambda: 0)


def example(dtype, vocab=10):
    generator = torch.Generator().manual_seed(3)
    logits = (torch.randn(6, 3, vocab, generator=generator) * 3).to(dtype)
    target = torch.randint(0, vocab, (6, 3), generator=generator)
    weight = torch.randn(6, 3, generator=generator)
    return logits, target, weight


def oracle(logits, target, weight):
    wide = logits.detach().double().requires_grad_()
    loss = F.cross_entropy(wide.flatten(0, 1), target.flatten(), reduction="none").view(6, 3)
    (grad,) = torch.autograd.grad(loss, wide, weight.double())
    return loss.detach(), grad


@pytest.mark.parametrize("block", [None, 35])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_whole_vocabulary(dtype, block, monkeypatch):
    if block is not None:
        monkeypatch.setitem(ours._BLOCK, "cpu", block)
    logits, target, weight = example(dtype)
    want, want_grad = oracle(logits, target, weight)
    leaf = logits.clone().requires_grad_()
    loss = ours.fused_vocab_parallel_cross_entropy(leaf * 1, target, ALONE)
    assert loss.dtype is (torch.float64 if dtype is torch.float64 else torch.float32)
    loss.backward(weight.to(loss.dtype))
    torch.testing.assert_close(loss.detach().double(), want, rtol=2e-6, atol=2e-6)
    rtol = 4e-3 if dtype is torch.bfloat16 else 2e-6
    torch.testing.assert_close(leaf.grad.double(), want_grad, rtol=rtol, atol=1e-6)
    assert torch.equal(leaf.detach(), logits)


def divided(rank, world_size):
    """Fused and unfused results on half a vocabulary, one entry of which is masked by -inf."""
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import cross_entropy as theirs

    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
    group, results = dist.group.WORLD, []
    logits, target, weight = example(torch.float32)
    # Column 0 is what a rank reads for the targets of other ranks.
    logits[..., 0] = logits[..., 5] = -torch.inf
    target = torch.where((target == 0) | (target == 5), 1, target)
    theirs.VocabParallelCrossEntropy.calculate_predicted_logits = staticmethod(
        ours.calculate_predicted_logits
    )
    for function in (
        lambda x: ours.fused_vocab_parallel_cross_entropy(x, target, group),
        lambda x: theirs.vocab_parallel_cross_entropy(x, target),
    ):
        leaf = logits[..., rank * 5 : rank * 5 + 5].clone().requires_grad_()
        loss = function(leaf * 1)
        loss.backward(weight)
        results.append((loss.detach(), leaf.grad))
    return results, oracle(logits, target, weight)


@pytest.mark.megatron014
def test_divided_vocabulary():
    for rank, (results, (want, grad)) in enumerate(
        run_ranks(divided, 2, preload="megatron", env=EAGER)
    ):
        mine = grad[..., rank * 5 : rank * 5 + 5]
        for loss, got in results:
            torch.testing.assert_close(loss.double(), want, rtol=2e-6, atol=2e-6)
            torch.testing.assert_close(got.double(), mine, rtol=2e-6, atol=1e-6)


def test_the_mask_by_multiplication_would_make_nan_of_a_masked_entry():
    logits = torch.tensor([[[-torch.inf, 1.0]]])
    maximum, target = torch.ones(1, 1), torch.tensor([[7]])
    elsewhere, _, predicted, _, _ = ours.calculate_predicted_logits(
        logits.clone(), target, maximum, 0, 2
    )
    assert elsewhere.all()
    assert predicted.item() == 0
    assert ((logits - maximum)[..., 0] * ~elsewhere).isnan().all()


def test_keeps_the_logits_and_writes_the_gradient_over_them():
    logits, target, weight = example(torch.bfloat16)
    kept, inner = {}, logits.clone().requires_grad_() * 1

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = ours.fused_vocab_parallel_cross_entropy(inner, target, ALONE)
    rows = 6 * 3
    # Logits, log-sum-exp, place of the target, whether it is elsewhere.
    assert sum(kept.values()) == rows * (10 * 2 + 4 + 8 + 1)
    (grad,) = torch.autograd.grad(loss, inner, weight, retain_graph=True)
    assert grad.data_ptr() == inner.data_ptr()
    loss = ours.fused_vocab_parallel_cross_entropy(logits.requires_grad_() * 1, target, ALONE)
    loss.backward(weight, retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward(weight)


def test_the_peak_holds_no_second_copy_of_the_logits(monkeypatch):
    monkeypatch.setitem(ours._BLOCK, "cpu", 4096)
    hidden = torch.randn(64, 1, 4).bfloat16().requires_grad_()
    target = torch.randint(0, 4096, (64, 1))
    with MemoryMeter() as meter:
        logits = F.linear(hidden, torch.ones(4096, 4, dtype=torch.bfloat16))
        loss = ours.fused_vocab_parallel_cross_entropy(logits, target, ALONE)
        del logits
        loss.sum().backward()
    assert meter.peak.nbytes < 2.5 * 64 * 4096


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "turn it on"),
        ({"cross_entropy_loss_fusion": True, "bf16": True}, "2 bytes a logit"),
        ({"cross_entropy_loss_fusion": True}, "as many bytes"),
    ],
)
def test_advice(options, words):
    assert words in cross_entropy.advise(SimpleNamespace(**options))
