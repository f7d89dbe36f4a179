"""RMSNorm forward and backward against eager torch, torch's own function and torch.compile.

Torch's own is Megatron's, too: without TransformerEngine its norm is `torch.nn.RMSNorm`.
"""

import torch
import torch.nn.functional as F
from driver import Case, main

import ms_ops
from ms_ops.testing import OPERATORS

plain = OPERATORS["rms_norm"].plain


def torch_own(x, weight):
    return F.rms_norm(x, weight.shape, weight, 1e-6)


def eager(x, weight):
    return plain(x, weight)[0]


def shape(rows, hidden):
    return Case(
        f"{rows}x{hidden}",
        lambda dtype: (torch.randn(rows, hidden).to(dtype), torch.randn(hidden).to(dtype)),
        (0, 1),
    )


if __name__ == "__main__":
    peers = {"eager": eager, "torch": torch_own, "compiled": torch.compile(eager)}
    main("rms_norm", ms_ops.rms_norm, peers, [shape(1024, 256), shape(2048, 1024)])
