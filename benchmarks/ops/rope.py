"""Rotary embedding forward and backward against eager torch and torch.compile."""

import torch
from driver import Case, main

import ms_ops
from ms_ops.testing import OPERATORS

plain = OPERATORS["rope"].plain


def shape(length, batch, heads, channels):
    def make(dtype):
        angles = torch.randn(length, 1, 1, channels)
        return torch.randn(length, batch, heads, channels).to(dtype), angles.cos(), angles.sin()

    return Case(f"sbnd_{length}x{batch}x{heads}x{channels}", make)


if __name__ == "__main__":
    peers = {"eager": plain, "compiled": torch.compile(plain)}
    main("rope", ms_ops.rope, peers, [shape(1024, 1, 8, 32), shape(2048, 2, 16, 64)])
