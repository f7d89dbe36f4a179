"""Free the output of a cheap call between its last use in forward and its first in backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..chain import chain_of, top_hooks
from ..errors import refuse
from .region import Region
from .replay import RNGS, Replay, Rng, Source, default_sources


class Discard:
    """A call whose interior and output are freed, and computed again in the backward.

        d = Discard()
        y = d(gelu, x)          # y = gelu(x)
        z = linear(y)           # whatever saves y
        d.release(until=z)      # y is empty until the backward reaches z

    It saves the bytes of y and of what `gelu` saves, for one more `gelu` a step. Gradients are
    bit-equal to those of the plain call.

    Without gradients, inside a checkpointed region, and while a compiler traces, it is the plain
    call: there is nothing to free, or somebody else frees it.

    Args:
        rng: "auto" replays the generators that the call drew from, "always" all, "never" none.
        autocast: "replay" gives the second run the autocast of the first, "ignore" that of the
            backward.
        sources: get and set of the states of all generators that count; None: torch's own, that of
            the CPU and that of the arguments' device.
    """

    def __init__(
        self,
        rng: Rng = "auto",
        autocast: Literal["replay", "ignore"] = "replay",
        *,
        sources: Sequence[Source] | None = None,
    ) -> None:
        if rng not in RNGS:
            raise ValueError(f"Discard: rng: got {rng!r}, need one of {RNGS}")
        if autocast not in ("replay", "ignore"):
            raise ValueError(f"Discard: autocast: got {autocast!r}, need 'replay' or 'ignore'")
        self._rng = rng
        self._autocast = autocast
        self._sources = sources
        self._region: Region | None = None
        self._outputs: tuple[Any, ...] = ()
        self._state: Literal["new", "plain", "called", "released"] = "new"

    @property
    def active(self) -> bool:
        """Whether there is an output to release."""
        return self._state == "called"

    def __call__(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Return `fn(*args, **kwargs)`, a tensor or a flat tuple.

        Raises:
            MemoryFeatureError: E-M01, an output shares its storage with an argument, a parameter
                or a buffer; E-M03, the last output was not released; E-M04, inside torch.func.
        """
        if self._state == "called":
            refuse("E-M03", "a second call before release()", "use one Discard for each output")
        self._state = "plain"
        hooks = top_hooks()
        if _plain_call(hooks):
            return fn(*args, **kwargs)
        tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
        region = Region(fn, make_replay(tensors, self._sources, self._rng, self._autocast))
        out = region.run(*args, **kwargs)
        outputs = out if isinstance(out, tuple) else (out,)
        _check_alias(fn, tensors, outputs)
        chain = chain_of(hooks)
        for tensor in outputs:
            if chain is not None and isinstance(tensor, Tensor):
                chain.claim(tensor.untyped_storage(), region)
        self._region, self._outputs, self._state = region, outputs, "called"
        return out

    def release(self, until: Tensor | Sequence[Tensor]) -> None:
        """Empty the output until the backward reaches `until`.

        Args:
            until: computed from everything that saves the output; several where several save it,
                the first that the backward reaches counts. The output must not be read any more.

        Raises:
            MemoryFeatureError: E-M02, `until` has no gradient; E-M03, no call to release, or
                `until` is the output itself.
        """
        untils = [until] if isinstance(until, Tensor) else list(until)
        if self._state == "plain":
            return
        if self._state != "called":
            where = "release() without a call before it, or twice"
            refuse("E-M03", where, "call it once, after what uses the output")
        region, outputs = self._region, self._outputs
        assert region is not None
        self._region, self._outputs, self._state = None, (), "released"
        tensors = [o for o in outputs if isinstance(o, Tensor)]
        if not any(u.requires_grad for u in untils):
            if any(t.requires_grad for t in tensors):
                remedy = "pass what the model computes from the output"
                refuse("E-M02", "release(until=...)", remedy)
            return  # no backward will ask
        _check_until(untils, tensors)
        region.discard(outputs)
        for node in {u.grad_fn for u in untils if u.grad_fn is not None}:
            node.register_prehook(lambda _: region.fill())

    @staticmethod
    def chain(discards: Sequence[Discard]) -> Chained:
        """Return several calls, each fed by the one before, with one release for all."""
        return Chained(discards)


class Chained:
    """Calls whose outputs are released together and come back in order.

    Args:
        discards: in the order of their calls.
    """

    def __init__(self, discards: Sequence[Discard]) -> None:
        self.discards = tuple(discards)

    def release(self, until: Tensor | Sequence[Tensor]) -> None:
        """Empty the outputs of all until the backward reaches `until`; see `Discard.release`."""
        for discard in self.discards:
            discard.release(until)


def make_replay(
    tensors: Sequence[Tensor], sources: Sequence[Source] | None, rng: Rng, autocast: str
) -> Replay:
    """Return what takes and gives back the states for a call with these tensors."""
    device = next((t.device for t in tensors if t.device.type != "cpu"), torch.device("cpu"))
    kinds = {"cpu", device.type} - {"meta"} if autocast == "replay" else set()
    sources = default_sources(device) if sources is None else sources
    return Replay(sources, rng, sorted(kinds))


def _plain_call(hooks: tuple[Any, ...] | None) -> bool:
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return True
    if torch._C._functorch.maybe_current_level() is not None:
        remedy = "call the function plainly inside torch.func transforms"
        refuse("E-M04", "torch.func", remedy)
    # Foreign hooks: a checkpoint drops the whole region anyway, and reads what it computes again
    # once, so that nothing in there may be emptied.
    return hooks is not None and chain_of(hooks) is None


def _check_alias(fn: Any, tensors: Sequence[Tensor], outputs: tuple[Any, ...]) -> None:
    state = [*fn.parameters(), *fn.buffers()] if isinstance(fn, nn.Module) else []
    taken = {id(s) for s in (t.untyped_storage() for t in (*tensors, *state))}
    for place, out in enumerate(outputs):
        if not isinstance(out, Tensor):
            continue
        outside = out.is_leaf and out.requires_grad
        if outside or id(out.untyped_storage()) in taken:
            where = f"output {place} of {getattr(fn, '__name__', type(fn).__name__)}"
            refuse("E-M01", where, "return a new tensor, or do not discard it")


def _check_until(untils: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
    made = {id(o.untyped_storage()) for o in outputs}
    if any(id(u.untyped_storage()) in made for u in untils):
        where = "release(until=...) got the output itself"
        refuse("E-M03", where, "release after what uses the output, until its result")
