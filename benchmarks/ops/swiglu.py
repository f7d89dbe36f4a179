"""SwiGLU forward and backward against eager torch, torch.compile and Megatron's own function."""

import megatron_peers
import torch
from driver import Case, main

import ms_ops
from ms_ops.testing import OPERATORS

plain = OPERATORS["swiglu"].plain


def shape(rows, hidden):
    return Case(f"{rows}x{hidden}", lambda dtype: (torch.randn(rows, 2 * hidden).to(dtype),))


if __name__ == "__main__":
    peers = {
        "eager": plain,
        "compiled": torch.compile(plain),
        "megatron": megatron_peers.swiglu,
    }
    cases = [shape(1024, 688), shape(2048, 2816)]
    main("swiglu", ms_ops.swiglu, peers, cases, compiled=True)
