"""Torch's CUDA attention kernels on CPU tensors, by what torch documents and asks of them.

`emulated()` registers CPU kernels for four aten operators that have none, and takes them back. They
refuse what the real ones refuse, compute in fp32, and leave NaN where those leave memory unwritten.
"""

import itertools
import math
from contextlib import contextmanager

import torch

LOW = (torch.float16, torch.bfloat16)


@contextmanager
def emulated():
    """Hold the kernels for the length of a block; yields the list of calls (name, arguments)."""
    calls = []
    kernels = {
        "_flash_attention_forward": flash_forward,
        "_flash_attention_backward": flash_backward,
        "_scaled_dot_product_efficient_attention": efficient_forward,
        "_scaled_dot_product_efficient_attention_backward": efficient_backward,
    }

    def recorded(name, kernel):
        def run(*args, **kwargs):
            calls.append((name, args, kwargs))
            return kernel(*args, **kwargs)

        return run

    with torch.library._scoped_library("aten", "IMPL") as library:
        for name, kernel in kernels.items():
            library.impl(name, recorded(name, kernel), "CPU")
        yield calls


def _check(*tensors):
    for x in tensors:
        assert x.dtype in LOW
        assert x.dtype == tensors[0].dtype
        assert x.shape[-1] % 8 == 0, "channels are not a multiple of 8"
        assert x.stride(-1) == 1, "channels are not neighbours"


def _sequences(q, k, starts_q, starts_k, max_q, max_k):
    """Slices of the queries and keys of each sequence, as [1, S, H, D] or [B, S, H, D]."""
    if starts_q is None:
        assert starts_k is None
        return [(slice(None), slice(None))]
    assert starts_q.dtype == starts_k.dtype == torch.int32
    assert max_q >= starts_q.diff().max()
    assert max_k >= starts_k.diff().max()
    ends = (starts_q.tolist(), starts_k.tolist())
    pairs = [[slice(a, b) for a, b in itertools.pairwise(e)] for e in ends]
    return list(zip(*pairs, strict=True))


def _batch(x):
    return x.transpose(1, 2).float() if x.dim() == 4 else x.transpose(0, 1).unsqueeze(0).float()


def _band(rows, keys, causal, left, right):
    """Bool [rows, keys]: the band that the flash kernel aligns to the lower right."""
    left, right = (-1 if side is None else side for side in (left, right))
    right = 0 if causal else right
    d = torch.arange(keys) - torch.arange(rows).unsqueeze(1) - (keys - rows)
    seen = torch.ones(rows, keys, dtype=torch.bool)
    seen = seen if left < 0 else seen & (d >= -left)
    return seen if right < 0 else seen & (d <= right)


def _repeat(x, heads):
    assert heads % x.shape[1] == 0
    return x.repeat_interleave(heads // x.shape[1], 1)


def _attend(q, k, v, scale, summand):
    """(out, lse) of [B, H, S, D] in fp32, weights rounded as the kernels do; +inf without keys."""
    scores = q @ k.transpose(-1, -2) * scale + summand
    lse = torch.logsumexp(scores, -1)
    probs = torch.exp(scores - lse.masked_fill(lse == -math.inf, 0.0).unsqueeze(-1))
    return probs @ v, lse.masked_fill(lse == -math.inf, math.inf)


def _differentiate(dy, q, k, v, y, lse, scale, summand):
    probs = torch.exp(q @ k.transpose(-1, -2) * scale + summand - lse.unsqueeze(-1))
    assert not probs.isnan().any()
    delta = (dy * y).sum(-1, keepdim=True)
    dscores = probs * (dy @ v.transpose(-1, -2) - delta)
    dq, dk = dscores @ k * scale, dscores.transpose(-1, -2) @ q * scale
    return dq, dk, probs.transpose(-1, -2) @ dy


def _no_keys(seen):
    return torch.zeros(seen.shape).masked_fill(~seen, -math.inf)


def flash_forward(
    query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, debug, **options
):
    assert options.keys() <= {"scale", "window_size_left", "window_size_right"}
    assert query.shape[-1] == value.shape[-1] <= 256
    assert not dropout_p
    assert not debug
    _check(query, key, value)
    window = (options.get("window_size_left"), options.get("window_size_right"))
    out = torch.full_like(query, math.nan)
    heads = query.shape[-2]
    shape = (query.shape[0], heads, query.shape[1])
    lse = torch.full(shape if cum_seq_q is None else (heads, query.shape[0]), math.nan)
    for rows, keys in _sequences(query, key, cum_seq_q, cum_seq_k, max_q, max_k):
        q, k, v = _batch(query[rows]), _batch(key[keys]), _batch(value[keys])
        band = _no_keys(_band(q.shape[2], k.shape[2], is_causal, *window))
        one, sums = _attend(q, _repeat(k, heads), _repeat(v, heads), options["scale"], band)
        if cum_seq_q is None:
            return one.transpose(1, 2).to(out.dtype), sums, *_rest(query)
        out[rows] = one[0].transpose(0, 1).to(out.dtype)
        lse[:, rows] = sums[0]
    return out, lse, *_rest(query)


def _rest(query):
    return (
        torch.zeros(2, dtype=torch.uint64),
        torch.zeros((), dtype=torch.uint64),
        query.new_empty(0),
    )


def flash_backward(
    grad_out,
    query,
    key,
    value,
    out,
    logsumexp,
    cum_seq_q,
    cum_seq_k,
    max_q,
    max_k,
    dropout_p,
    is_causal,
    rng_state,
    unused,
    **options,
):
    _check(grad_out, query, key, value, out)
    assert logsumexp.is_contiguous()
    assert logsumexp.dtype == torch.float32
    window = (options.get("window_size_left"), options.get("window_size_right"))
    grads = [torch.full_like(x, math.nan) for x in (query, key, value)]
    heads, groups = query.shape[-2], key.shape[-2]
    for rows, keys in _sequences(query, key, cum_seq_q, cum_seq_k, max_q, max_k):
        dy, q, y = (_batch(x[rows]) for x in (grad_out, query, out))
        k, v = (_repeat(_batch(x[keys]), heads) for x in (key, value))
        lse = logsumexp if cum_seq_q is None else logsumexp[:, rows].unsqueeze(0)
        band = _no_keys(_band(q.shape[2], k.shape[2], is_causal, *window))
        dq, *others = _differentiate(dy, q, k, v, y, lse, options["scale"], band)
        found = [dq, *(g.unflatten(1, (groups, -1)).sum(2) for g in others)]
        for grad, one, place in zip(grads, found, (rows, keys, keys), strict=True):
            one = one.transpose(1, 2).to(grad.dtype)
            grad[place] = one if cum_seq_q is None else one[0]
    return tuple(grads)


def _bias_of(bias, query, key, triangle):
    rows, keys = query.shape[2], key.shape[2]
    if triangle:
        assert bias is None
        return _no_keys(torch.ones(rows, keys, dtype=torch.bool).tril())
    if bias is None:
        return torch.zeros(())
    assert bias.dtype == query.dtype
    assert tuple(bias.shape) == (query.shape[0], query.shape[1], rows, keys)
    assert all(s % 8 == 0 for s in bias.stride()[:3]), "rows of the bias are not aligned"
    return bias.float()


def efficient_forward(query, key, value, bias, sums, dropout_p=0.0, triangle=False, *, scale):
    assert sums
    assert not dropout_p
    assert query.shape[1] == key.shape[1] == value.shape[1], "heads are not alike"
    _check(query, key, value)
    summand = _bias_of(bias, query, key, triangle)
    out, lse = _attend(query.float(), key.float(), value.float(), scale, summand)
    # Nothing is promised for rows without keys.
    out = out.masked_fill((lse == math.inf).unsqueeze(-1), math.nan)
    lse = torch.nn.functional.pad(lse, (0, -query.shape[2] % 32), value=math.nan)
    seed = torch.zeros((), dtype=torch.int64)
    return out.to(query.dtype), lse, seed, seed


def efficient_backward(
    grad_out,
    query,
    key,
    value,
    bias,
    out,
    logsumexp,
    seed,
    offset,
    dropout_p,
    wanted,
    triangle=False,
    *,
    scale,
):
    _check(grad_out, query, key, value, out)
    rows = query.shape[2]
    assert logsumexp.shape[-1] == -(-rows // 32) * 32, "the log-sum-exp is not padded"
    assert wanted == [True, True, True, False]
    operands = (x.float() for x in (grad_out, query, key, value, out))
    summand = _bias_of(bias, query, key, triangle)
    grads = _differentiate(*operands, logsumexp[..., :rows], scale, summand)
    return *(g.to(query.dtype) for g in grads), query.new_empty(0)
