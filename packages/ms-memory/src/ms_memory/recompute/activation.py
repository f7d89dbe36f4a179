"""Discard the output of activation functions, and what gated ones keep inside."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import refuse
from .discard import Discard
from .match import Layers, Plan, chosen, matched

if TYPE_CHECKING:
    from ..session import Session

FEATURE = "recompute.activation"
_FUNCTIONS = (nn.GELU, nn.SiLU, nn.ReLU, nn.Tanh, nn.Sigmoid, nn.Mish, nn.Softplus, nn.ELU)
_NAMES = ("act", "act_fn", "activation", "activation_fn", "activation_func")
# down(act(gate(x)) * up(x)): names of gate, up, down, act.
_GATED = (
    ("gate_proj", "up_proj", "down_proj", "act_fn"),
    ("w1", "w3", "w2", "act_fn"),
    ("w1", "w3", "w2", ""),  # silu, written out
)


@dataclass(frozen=True)
class Gated:
    """A gated MLP: `down(act(gate(x)) * up(x))`."""

    gate: nn.Module
    up: nn.Module
    down: nn.Module
    act: Callable[[Tensor], Tensor]

    def product(self, gate: Tensor, up: Tensor) -> Tensor:
        """Return what `down` reads."""
        return self.act(gate) * up

    def plain(self, x: Tensor) -> Tensor:
        """Return the output as the module's own forward computes it."""
        out: Tensor = self.down(self.product(self.gate(x), self.up(x)))
        return out


def activation(
    session: Session, match: Plan = "auto", layers: Layers = None, *, consumer: str | None = None
) -> list[str]:
    """Discard activations until the backward needs them.

    Saves, with w bytes an element, s tokens, b batch and f hidden: w sbf a layer for a plain
    activation, 2w sbf for a gated one in eager torch. Costs one more activation.

    Args:
        session: of the model.
        match: "auto" for activations followed by a linear layer and for gated MLPs
            (`gate_proj`, `up_proj`, `down_proj`, or `w1`, `w3`, `w2`); or names with wildcards of
            gated MLPs, or of activation modules, or a function of name and module.
        layers: None for all, the first so many, a slice, or a function of the layer's index.
        consumer: names of the modules that read what `match` returns, beside them; None: the module
            after it.

    Returns:
        The paths of what was found.

    Raises:
        MemoryFeatureError: E-M22, nothing was found, or the consumer reads something else; E-M10
            and E-M05, see `Session.claim`.
    """
    model = session.model
    if match == "auto":
        candidates = activations_of(model)
        if not candidates:
            remedy = "name the activation modules with match= and their readers with consumer="
            refuse("E-M22", "no activation module before a linear layer, no gated MLP", remedy)
    else:
        candidates = [n for n, _ in matched(model, match)]
    paths = chosen(model, candidates, layers)
    for path in paths:
        module = model.get_submodule(path)
        gated = _gated(module)
        if gated is not None:
            session.claim(module, FEATURE, "gated")
            session.wrap(module, functools.partial(_gated_forward, session, gated))
            continue
        reader = _reader(model, path, consumer) if consumer else _after(model, path, module)
        if reader is None:
            refuse("E-M22", f"a linear layer after {path!r}", "name it with consumer=")
        session.claim(module, FEATURE, f"until {session.path(reader)}")
        _pair(session, module, reader)
    return paths


def activations_of(model: nn.Module, layer: str = "") -> list[str]:
    """Return the paths of what "auto" finds, in the whole model or in one layer."""
    named = model.get_submodule(layer).named_modules(prefix=layer)
    return [n for n, m in named if _gated(m) or _after(model, n, m)]


def _gated_forward(
    session: Session, gated: Gated, original: Callable[..., Any]
) -> Callable[..., Any]:
    def forward(x: Tensor) -> Any:
        if not torch.is_grad_enabled():
            return original(x)
        discard = Discard(sources=session.sources)
        out = gated.down(discard(gated.product, gated.gate(x), gated.up(x)))
        discard.release(until=first_tensor(out))
        return out

    return forward


def _pair(session: Session, act: nn.Module, reader: nn.Module) -> None:
    """Discard what `act` returns until `reader`, which follows, has run."""
    pending: list[tuple[Discard, Any]] = []

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            discard = Discard(sources=session.sources)
            y = discard(original, *args, **kwargs)
            # One left over is of a forward that raised; it was never emptied.
            pending[:] = [(discard, y)] if discard.active else []
            return y

        return forward

    def release(module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        if module is not reader or not pending:
            return
        discard, y = pending.pop()
        if not any(a is y for a in args):
            where = f"{session.path(act)!r}: {session.path(reader)!r} does not read its output"
            refuse("E-M22", where, "name the module that does with consumer=")
        discard.release(until=first_tensor(out))

    session.wrap(act, make)
    session.on_close(reader.register_forward_hook(release).remove)


def first_tensor(out: Any) -> Tensor:
    """Return the first tensor of a module's output."""
    if isinstance(out, Tensor):
        return out
    found: Tensor = next(o for o in out if isinstance(o, Tensor))
    return found


def _gated(module: nn.Module) -> Gated | None:
    """Return the parts of a gated MLP whose forward is the known formula, bit for bit."""
    children = dict(module.named_children())
    for gate, up, down, act in _GATED:
        if {n for n in (gate, up, down, act) if n} != set(children):
            continue
        fn = children[act] if act else F.silu
        gated = Gated(children[gate], children[up], children[down], fn)
        if _same(module, gated):
            return gated
    return None


def _same(module: nn.Module, gated: Gated) -> bool:
    """Whether the formula computes what the module does, tried on two tokens."""
    weight = getattr(gated.gate, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2 or weight.is_meta:
        return False
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 2, weight.shape[1], generator=generator).to(weight)
    with torch.no_grad(), torch.random.fork_rng([weight.device] if weight.is_cuda else []):
        try:
            return torch.equal(module(x), gated.plain(x))
        except (TypeError, RuntimeError):  # other arguments, other shapes
            return False


def _is_activation(name: str, module: nn.Module) -> bool:
    return isinstance(module, _FUNCTIONS) or name.rpartition(".")[2] in _NAMES


def _after(model: nn.Module, path: str, module: nn.Module) -> nn.Module | None:
    """Return the linear layer that follows an activation among its siblings."""
    if not path or not _is_activation(path, module) or any(True for _ in module.children()):
        return None
    above, _, name = path.rpartition(".")
    siblings = list(model.get_submodule(above).named_children())
    place = [n for n, _ in siblings].index(name)
    following = siblings[place + 1][1] if place + 1 < len(siblings) else None
    weight = getattr(following, "weight", None)
    return following if isinstance(weight, Tensor) and weight.dim() == 2 else None


def _reader(model: nn.Module, path: str, consumer: str) -> nn.Module:
    """Return the module named by `consumer` that lies nearest to a path."""
    names = [n for n, _ in matched(model, consumer)]
    above = path.rpartition(".")[0]
    beside = [n for n in names if n.rpartition(".")[0] == above]
    if len(beside) != 1:
        where = f"{consumer!r} names {len(beside)} modules beside {path!r}"
        refuse("E-M22", where, "name one for each activation")
    return model.get_submodule(beside[0])
