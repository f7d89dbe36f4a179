"""SwiGLU forward and backward against eager torch and torch.compile."""

import torch
from driver import Case, main

import ms_ops
from ms_ops.testing import OPERATORS

plain = OPERATORS["swiglu"].plain


def shape(rows, hidden):
    return Case(f"{rows}x{hidden}", lambda dtype: (torch.randn(rows, 2 * hidden).to(dtype),))


if __name__ == "__main__":
    peers = {"eager": plain, "compiled": torch.compile(plain)}
    main("swiglu", ms_ops.swiglu, peers, [shape(1024, 688), shape(2048, 2816)])
