"""Causal attention forward and backward against eager torch, torch's function and Megatron's."""

import megatron_peers
import torch
import torch.nn.functional as F
from driver import Case, main

import ms_ops
from ms_ops.testing import OPERATORS

plain = OPERATORS["attention"].plain


def eager(q, k, v):
    return plain(q, k, v, layout="sbhd", causal=True)[0]


def fused(q, k, v):
    return ms_ops.attention(q, k, v, layout="sbhd", causal=True)


def torch_own(q, k, v):
    q, k, v = (t.permute(1, 2, 0, 3) for t in (q, k, v))
    gqa = q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)
    return out.permute(2, 0, 1, 3)


def shape(length, heads, groups, channels):
    def make(dtype):
        sizes = (heads, groups, groups)
        return tuple(torch.randn(length, 1, n, channels).to(dtype) for n in sizes)

    return Case(f"s{length}_h{heads}_g{groups}_d{channels}", make, (0, 1, 2))


if __name__ == "__main__":
    peers = {"eager": eager, "torch": torch_own, "megatron": megatron_peers.attention}
    cases = [
        shape(512, 8, 8, 32),
        shape(1024, 8, 8, 32),
        shape(1024, 8, 2, 64),
        shape(2048, 8, 8, 32),
    ]
    main("attention", fused, peers, cases)
