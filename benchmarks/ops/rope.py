"""Rotary embedding from angles against eager torch, torch.compile and Megatron's own function."""

import megatron_peers
import torch
from driver import Case, main

import ms_ops
from ms_ops.testing import OPERATORS

plain = OPERATORS["rope"].plain


def eager(x, angles):
    return plain(x, angles.cos(), angles.sin())


def shape(length, batch, heads, channels):
    def make(dtype):
        angles = torch.randn(length, 1, 1, channels // 2).repeat(1, 1, 1, 2)
        return torch.randn(length, batch, heads, channels).to(dtype), angles

    return Case(f"sbnd_{length}x{batch}x{heads}x{channels}", make)


if __name__ == "__main__":
    peers = {
        "eager": eager,
        "compiled": torch.compile(eager),
        "megatron": megatron_peers.rope,
    }
    cases = [shape(1024, 1, 8, 32), shape(2048, 2, 16, 64)]
    main("rope", ms_ops.rope_freqs, peers, cases, compiled=True)
