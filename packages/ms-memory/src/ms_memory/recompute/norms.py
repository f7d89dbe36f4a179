"""Discard the outputs of norms."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..errors import refuse
from .discard import Discard
from .match import Layers, Plan, chosen, matched

if TYPE_CHECKING:
    from ..session import Session

FEATURE = "recompute.norms"
_NORM = re.compile(r"(Layer|RMS|Rms)Norm|^Norm$")


def norms(session: Session, match: Plan = "auto", layers: Layers = None) -> list[str]:
    """Discard the outputs of norms until the backward needs them.

    Saves w sbh a norm (w bytes an element, s tokens, b batch, h wide) and its statistics; costs one
    more norm. What reads an output is observed: its siblings that get it as an argument. An output
    that no sibling reads, or that the layer returns, is kept.

    Args:
        session: of the model.
        match: "auto" for layer and RMS norms directly in a layer of a `ModuleList`; or names with
            wildcards, or a function of name and module.
        layers: None for all, the first so many, a slice, or a function of the layer's index.

    Returns:
        The paths of what was found.

    Raises:
        MemoryFeatureError: E-M22, nothing was found; E-M10 and E-M05, see `Session.claim`.
    """
    model = session.model
    if match == "auto":
        candidates = [n for n, m in model.named_modules() if _of_a_layer(model, n, m)]
        if not candidates:
            refuse("E-M22", "no norm directly in a layer of a ModuleList", "name them with match=")
    else:
        candidates = [n for n, m in matched(model, match) if not isinstance(m, nn.Identity)]
        if not candidates:
            refuse("E-M22", f"{match!r} names identities alone", "name the norms")
    paths = chosen(model, candidates, layers)
    by_layer: dict[str, list[str]] = {}
    for path in paths:
        session.claim(model.get_submodule(path), FEATURE)
        by_layer.setdefault(path.rpartition(".")[0], []).append(path)
    for above, inside in by_layer.items():
        _watch_layer(session, model.get_submodule(above), [model.get_submodule(p) for p in inside])
    # Whoever saves an output inline, unseen, gets it back through the chain.
    session.need_chain()
    return paths


@dataclass
class _Pending:
    """An output that waits for the end of its layer."""

    discard: Discard
    out: Tensor
    readers: list[Tensor] = field(default_factory=list)


def _watch_layer(session: Session, layer: nn.Module, inside: list[nn.Module]) -> None:
    waiting: list[_Pending] = []

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            discard = Discard(sources=session.sources)
            out = discard(original, *args, **kwargs)
            if discard.active and isinstance(out, Tensor):
                waiting.append(_Pending(discard, out))
            return out

        return forward

    def begin(module: nn.Module, args: Any) -> None:
        waiting.clear()

    def read(module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        given = {id(a) for a in tree_leaves((args, kwargs)) if isinstance(a, Tensor)}
        for pending in waiting:
            if id(pending.out) in given:
                pending.readers += _differentiable(out)

    def end(module: nn.Module, args: Any, out: Any) -> None:
        found, waiting[:] = list(waiting), []
        if module is layer:
            for pending in found:
                _release(pending, out)

    for norm in inside:
        session.wrap(norm, make)
    handles = [layer.register_forward_pre_hook(begin), layer.register_forward_hook(end)]
    for sibling in layer.children():
        handles.append(sibling.register_forward_hook(read, with_kwargs=True))
    for handle in handles:
        session.on_close(handle.remove)


def _release(pending: _Pending, returned: Any) -> None:
    storage = pending.out.untyped_storage()
    leaves = (t for t in tree_leaves(returned) if isinstance(t, Tensor))
    outside = any(t.untyped_storage() is storage for t in leaves)
    readers = [t for t in pending.readers if t.untyped_storage() is not storage]
    if readers and not outside:
        pending.discard.release(until=readers)


def _differentiable(out: Any) -> list[Tensor]:
    return [t for t in tree_leaves(out) if isinstance(t, Tensor) and t.grad_fn is not None]


def norms_of(model: nn.Module, layer: str) -> list[str]:
    """Return the paths of the layer and RMS norms directly in a layer."""
    children = model.get_submodule(layer).named_children()
    return [f"{layer}.{n}" for n, m in children if _NORM.search(type(m).__name__)]


def _of_a_layer(model: nn.Module, path: str, module: nn.Module) -> bool:
    above = path.rpartition(".")[0]
    inside = above and isinstance(model.get_submodule(above.rpartition(".")[0]), nn.ModuleList)
    return bool(inside) and _NORM.search(type(module).__name__) is not None
