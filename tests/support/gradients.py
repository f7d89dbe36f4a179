"""Steps of a small transformer whose gradients must not change by a bit."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from support.gpt import Shape, gpt, tokens

PLAIN, GATED = Shape(), Shape(gated=True)


def _bf16() -> Any:
    return torch.autocast("cpu", torch.bfloat16)


# Name -> shape of the model, arguments of `run`.
MATRIX: dict[str, tuple[Shape, dict[str, Any]]] = {
    "plain": (PLAIN, {}),
    "gated": (GATED, {}),
    "dropout": (replace(PLAIN, dropout=0.3), {}),
    "autocast": (GATED, {"context": _bf16}),
    "gqa": (replace(GATED, groups=2), {}),
    "tied": (replace(PLAIN, tied=True), {}),
    "accumulation": (PLAIN, {"steps": 3}),
    "retain_graph": (PLAIN, {"retain": True}),
    "evaluation between": (replace(PLAIN, dropout=0.3), {"evaluate": True}),
    "parallel_residual": (replace(PLAIN, parallel=True), {}),
}


def run(
    model: nn.Module,
    shape: Shape,
    *,
    context: Callable[[], Any] = contextlib.nullcontext,
    steps: int = 2,
    retain: bool = False,
    evaluate: bool = False,
) -> list[Tensor]:
    """Return losses, gradients, buffers and the generator's state after accumulating steps."""
    model.zero_grad()
    torch.manual_seed(5)
    found = []
    target = tokens(shape, seed=9).flatten()
    for step in range(steps):
        with context():
            logits = model(tokens(shape, seed=step))
            loss = F.cross_entropy(logits.flatten(0, 1).float(), target)
        if evaluate:
            model.eval()
            with torch.no_grad():
                found.append(model(tokens(shape, seed=7)))
            model.train()
        loss.backward(retain_graph=retain)
        if retain:
            loss.backward()
        found.append(loss.detach())
    found += [p.grad for p in model.parameters() if p.grad is not None]
    return [*found, *model.buffers(), torch.get_rng_state()]


def all_equal(left: Sequence[Tensor], right: Sequence[Tensor]) -> bool:
    """Whether two runs agree in every bit."""
    return len(left) == len(right) and all(map(torch.equal, left, right))


def check(
    name: str, applied: Callable[[nn.Module], contextlib.AbstractContextManager[Any]]
) -> None:
    """Assert that a model under a feature does what the plain one does, twice.

    Args:
        name: of the `MATRIX`.
        applied: context in which the feature acts on a model.
    """
    shape, how = MATRIX[name]
    expected = run(gpt(shape), shape, **how)
    model = gpt(shape)
    with applied(model):
        assert all_equal(run(model, shape, **how), expected)
        assert all_equal(run(model, shape, **how), expected)
