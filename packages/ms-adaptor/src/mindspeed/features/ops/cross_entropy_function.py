"""Cross entropy of a vocabulary that is divided among ranks, from the logits as they are.

m = max of a row, l = sum of exp(x - m), both over all ranks
loss = log(l) - (x[target] - m)          dx = (exp(x - m - log(l)) - onehot(target)) * dloss
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ms_ops.device import upcast

# Elements of the logits in a block: on a CPU 1 MiB of fp32, elsewhere few launches.
_BLOCK = {"cpu": 1 << 18}
_LARGE_BLOCK = 1 << 26


def fused_vocab_parallel_cross_entropy(
    vocab_parallel_logits: Tensor, target: Tensor, tp_group: Any
) -> Tensor:
    """Return the cross entropy of each token.

    Saves the logits, no softmax; backward writes the gradient over them (Megatron's code writes
    it over its softmax), so that a second backward raises. Logits that are a leaf stay as they are.

    Args:
        vocab_parallel_logits: [s, b, v], the part of this rank of each row, any float dtype.
        target: int64 [s, b], ids in the whole vocabulary.
        tp_group: the ranks that hold the parts, in the order of the vocabulary.

    Returns:
        fp32 [s, b] (fp64 for fp64).
    """
    loss: Tensor = _CrossEntropy.apply(vocab_parallel_logits, target, tp_group)  # type: ignore[no-untyped-call]
    return loss


def calculate_predicted_logits(
    vocab_parallel_logits: Tensor,
    target: Tensor,
    logits_max: Tensor,
    vocab_start_index: int,
    vocab_end_index: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return what Megatron's unfused cross entropy needs, without indexing by a mask.

    An assignment to masked places reads their number from the device. Multiplication by the mask
    would not, but makes NaN of the infinite logit of a masked vocabulary entry.

    Args:
        vocab_parallel_logits: fp32 [s, b, v], overwritten by its exponentials.
        target: [s, b].
        logits_max: [s, b], over all ranks.
        vocab_start_index: first id of this rank.
        vocab_end_index: the one after its last.

    Returns:
        (mask of the targets of other ranks [s, b], target within this rank [s * b], its logit
        [s, b] or 0, sum of exponentials [s, b], exponentials [s, b, v]).
    """
    vocab_parallel_logits -= logits_max.unsqueeze(-1)
    place, elsewhere = _places(target, vocab_start_index, vocab_end_index)
    flat = vocab_parallel_logits.view(-1, vocab_parallel_logits.shape[-1])
    predicted = _predicted(flat, place, elsewhere).view_as(target)
    exponentials = vocab_parallel_logits.exp_()
    return elsewhere.view_as(target), place, predicted, exponentials.sum(-1), exponentials


def _places(target: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """Return the targets within [start, stop), 0 for others, and which those are."""
    flat = target.reshape(-1)
    elsewhere = (flat < start) | (flat >= stop)
    return (flat - start).masked_fill_(elsewhere, 0), elsewhere


def _predicted(logits: Tensor, place: Tensor, elsewhere: Tensor) -> Tensor:
    return logits.gather(1, place.unsqueeze(1)).squeeze(1).masked_fill_(elsewhere, 0)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, group: Any) -> Tensor:
        flat = logits.reshape(-1, logits.shape[-1])
        start = group.rank() * flat.shape[1]
        place, elsewhere = _places(target, start, start + flat.shape[1])
        largest = upcast(flat.amax(-1)) if flat.shape[0] else upcast(flat.new_empty(0))
        _reduce(largest, dist.ReduceOp.MAX, group)
        sums = largest.new_empty((2, flat.shape[0]))
        torch.sub(upcast(_predicted(flat, place, elsewhere)), largest, out=sums[0])
        sums[0].masked_fill_(elsewhere, 0)
        for rows in _blocks(flat):
            shifted = torch.sub(upcast(flat[rows]), largest[rows].unsqueeze(1))
            torch.sum(shifted.exp_(), -1, out=sums[1][rows])
        _reduce(sums, dist.ReduceOp.SUM, group)
        log = sums[1].log()
        ctx.save_for_backward(logits, largest.add_(log), place, elsewhere)
        ctx.written_over = not logits.is_leaf
        return log.sub_(sums[0]).view(target.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        logits, lse, place, elsewhere = ctx.saved_tensors
        flat = logits.reshape(-1, logits.shape[-1])
        out = flat if ctx.written_over else torch.empty_like(flat)
        scale = grads[0].reshape(-1, 1)
        mine = scale.masked_fill(elsewhere.unsqueeze(1), 0).neg_()
        for rows in _blocks(flat):
            grad = torch.sub(upcast(flat[rows]), lse[rows].unsqueeze(1)).exp_().mul_(scale[rows])
            out[rows] = grad.scatter_add_(1, place[rows].unsqueeze(1), mine[rows])
        return out.view(logits.shape), None, None


def _reduce(values: Tensor, op: Any, group: Any) -> None:
    if group.size() > 1:
        dist.all_reduce(values, op, group=group)


def _blocks(logits: Tensor) -> Iterator[slice]:
    block = _BLOCK.get(logits.device.type, _LARGE_BLOCK)
    step = max(1, block // max(1, logits.shape[1]))
    return (slice(first, first + step) for first in range(0, logits.shape[0], step))
