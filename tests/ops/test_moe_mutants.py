"""Wrong kernels: the test body must catch each of them."""

import pytest
import torch

from ms_ops.moe import reference as moe
from support.mutants import caught


class Right:
    """The correct kernels of one operator, as the mutants' helper takes them."""

    def __init__(self, forward, backward):
        self.forward, self.backward = forward, backward


OPERATORS = {
    "moe_permute": Right(moe.permute, moe.permute_backward),
    "moe_unpermute": Right(moe.unpermute, moe.unpermute_backward),
    "moe_permute_map": Right(moe.permute_map, moe.permute_map_backward),
    "moe_unpermute_map": Right(moe.unpermute_map, moe.unpermute_map_backward),
}


def order_returned(tokens, indices, rows):
    permuted, _ = moe.permute(tokens, indices, rows)
    return permuted, indices.reshape(-1).argsort(stable=True).int()


def later_tokens_first(tokens, indices, rows):
    indices = indices.flip(0)
    return moe.permute(tokens.flip(0), indices, rows)


def dropped_rows_counted(dpermuted, sorted_indices, tokens, k):
    slots = sorted_indices.clamp(max=max(dpermuted.shape[0] - 1, 0))
    return moe.permute_backward(dpermuted, slots, tokens, k)


def one_choice_lost(dpermuted, sorted_indices, tokens, k):
    slots = sorted_indices.view(tokens, k).clone()
    slots[:, 0] = dpermuted.shape[0]
    return moe.permute_backward(dpermuted, slots.view(-1), tokens, k)


def weights_dropped(permuted, sorted_indices, probs):
    probs = None if probs is None else torch.ones_like(probs)
    return moe.unpermute(permuted, sorted_indices, probs)


def weights_turned(permuted, sorted_indices, probs):
    probs = None if probs is None else probs.flip(1)
    return moe.unpermute(permuted, sorted_indices, probs)


def weight_missing_in_backward(dout, permuted, sorted_indices, probs, rows):
    ones = None if probs is None else torch.ones_like(probs)
    return moe.unpermute_backward(dout, permuted, sorted_indices, ones, rows)


def weight_gradient_of_other_slots(dout, permuted, sorted_indices, probs, rows):
    dpermuted, dprobs = moe.unpermute_backward(dout, permuted, sorted_indices, probs, rows)
    return dpermuted, dprobs.flip(-1) if dprobs.dim() == 2 else dprobs


def token_numbers_returned(tokens, routing_map, probs, rows, drop_and_pad, *_):
    permuted, weights, order = moe.permute_map(tokens, routing_map, probs, rows, drop_and_pad)
    return permuted, weights, moe._rows_of(routing_map, rows, drop_and_pad)[0].to(order.dtype)


def capacity_takes_the_last(tokens, routing_map, probs, rows, drop_and_pad, *_):
    if not drop_and_pad:
        return moe.permute_map(tokens, routing_map, probs, rows, drop_and_pad)
    flipped = None if probs is None else probs.flip(0)
    return moe.permute_map(tokens.flip(0), routing_map.flip(0), flipped, rows, drop_and_pad)


def probs_gradient_unsorted(dpermuted, dprobs, sorted_indices, routing_map, drop_and_pad, *_):
    dprobs = None if dprobs is None else dprobs[sorted_indices.long()]
    return moe.permute_map_backward(dpermuted, dprobs, sorted_indices, routing_map, drop_and_pad)


def all_weights_one(permuted, sorted_indices, routing_map, probs, drop_and_pad, *_):
    return moe.unpermute_map(permuted, sorted_indices, routing_map, None, drop_and_pad)


def padding_ignored(permuted, sorted_indices, routing_map, probs, drop_and_pad, *_):
    if drop_and_pad:
        permuted = permuted.clone()
        permuted[-1:] = 0
    return moe.unpermute_map(permuted, sorted_indices, routing_map, probs, drop_and_pad)


def rows_unweighted(dout, permuted, sorted_indices, routing_map, probs, drop_and_pad, *_):
    args = (permuted, sorted_indices, routing_map)
    _, dprobs = moe.unpermute_map_backward(dout, *args, probs, drop_and_pad)
    return moe.unpermute_map_backward(dout, *args, None, drop_and_pad)[0], dprobs


MUTANTS = [
    ("moe_permute", order_returned, None),
    ("moe_permute", later_tokens_first, None),
    ("moe_permute", None, dropped_rows_counted),
    ("moe_permute", None, one_choice_lost),
    ("moe_unpermute", weights_dropped, None),
    ("moe_unpermute", weights_turned, None),
    ("moe_unpermute", None, weight_missing_in_backward),
    ("moe_unpermute", None, weight_gradient_of_other_slots),
    ("moe_permute_map", token_numbers_returned, None),
    ("moe_permute_map", capacity_takes_the_last, None),
    ("moe_permute_map", None, probs_gradient_unsorted),
    ("moe_unpermute_map", all_weights_one, None),
    ("moe_unpermute_map", padding_ignored, None),
    ("moe_unpermute_map", None, rows_unweighted),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("op", "forward", "backward"), MUTANTS, ids=[(f or b).__name__ for _, f, b in MUTANTS]
)
def test_mutant_is_caught(op, forward, backward, dtype):
    assert caught(op, dtype, OPERATORS[op], forward, backward) > 0
