"""FLOPs of matrix products, counted operator by operator as they are dispatched.

    with FlopMeter() as meter:
        model(x).sum().backward()
    meter.counts                                  # Flops(forward=..., backward=..., ...)
    meter.mfu(step_time=0.8, peak=peak_flops("NVIDIA H100 SXM"))

Every count is an exact integer. Only matrix products count (attention and convolutions included):
they are what peak rates are stated for. Work under `no_grad` outside of backward (evaluation, an
optimizer's products) is kept apart as `other`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor
from torch._ops import OpOverload
from typing_extensions import Self

from ..tap import Meter, module, phase
from ..tap import Phase as _Phase
from . import registry
from .attention import ATTENTION, Attention, Pending
from .registry import Counter, UnknownOperator

PHASES = ("forward", "backward", "recompute", "other")


@dataclass(frozen=True)
class Flops:
    """FLOPs by what they were for.

    Attributes:
        forward: the model's forward, once.
        backward: gradients.
        recompute: forwards that checkpointing ran again inside backward.
        other: outside of backward without gradients: evaluation, an optimizer step.
    """

    forward: int = 0
    backward: int = 0
    recompute: int = 0
    other: int = 0

    @property
    def model(self) -> int:
        """Forward and backward: what the model needs, the numerator of MFU."""
        return self.forward + self.backward

    @property
    def hardware(self) -> int:
        """Recomputation included: the numerator of HFU."""
        return self.model + self.recompute


@dataclass(frozen=True)
class _Place:
    phase: _Phase
    module: str
    op: str
    dtype: str


class FlopMeter(Meter):
    """Counts the FLOPs of what runs inside its context.

    Entering it again adds to the counts; with `sample_every=n` only the first of each n entries is
    counted, the others cost nothing, and rates are per counted entry. So enter it once a step.

    Args:
        attention: what counts of attention: "model", the entries that the mask leaves (causal
            squares count half), backward twice forward; "launched", what kernels do, which compute
            the scores again in backward (2.5 times forward for equal channels); "full", as if
            there were no mask. Masks that are tensors are not read: they count as full.
        unknown: "error" raises at an operator that may multiply matrices and has no formula;
            "warn" warns once an operator and counts nothing for it.
        by_module: follow module paths; off, a step costs less and `by_module` stays empty.
        sample_every: count one entry of so many.

    Raises:
        ValueError: an unknown choice, a sample interval below 1.
        UnknownOperator: inside the context, see `unknown`.
    """

    hears_higher_order: ClassVar[bool] = True

    def __init__(
        self,
        *,
        attention: Attention = "model",
        unknown: Literal["error", "warn"] = "error",
        by_module: bool = True,
        sample_every: int = 1,
    ) -> None:
        for name, value, allowed in (
            ("attention", attention, ATTENTION),
            ("unknown", unknown, ("error", "warn")),
        ):
            if value not in allowed:
                need = ", ".join(map(repr, allowed))
                raise ValueError(f"FlopMeter: {name}: got {value!r}, need one of {need}")
        if sample_every < 1:
            raise ValueError(f"FlopMeter: sample_every: got {sample_every}, need 1 or more")
        self._attention: Attention = attention
        self._unknown = unknown
        self._every = sample_every
        self._follow = by_module
        # The base class asks for this when the meter is entered.
        vars(self)["watches_modules"] = by_module
        self._counters: dict[OpOverload, Counter | None] = {}
        self._uncounted: list[str] = []
        self._passing = False
        self.reset()

    def reset(self) -> None:
        """Forget what was counted, and begin to sample anew."""
        self._counts: defaultdict[_Place, int] = defaultdict(int)
        self._pending: list[tuple[_Place, Pending]] = []
        self._entries = 0
        self.sampled = 0

    def __enter__(self) -> Self:
        if self._passing:
            raise RuntimeError("this FlopMeter is on already: make a second one to nest them")
        if not self.is_on and self._entries % self._every:
            self._passing = True
        else:
            super().__enter__()
            self.sampled += 1
        self._entries += 1
        return self

    def __exit__(self, *exc: object) -> None:
        if self._passing:
            self._passing = False
        else:
            super().__exit__(*exc)

    def after(
        self, func: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any
    ) -> Any:
        """Count one operator."""
        if func not in self._counters:
            self._counters[func] = self._find(func)
        counter = self._counters[func]
        if counter is None:
            return out
        number = counter(args, kwargs, out)
        path = module() if self._follow else ""
        place = _Place(phase(), path, registry.name_of(func), _dtype(args))
        if not isinstance(number, int):
            self._pending.append((place, number))
        elif number:
            self._counts[place] += number
        return out

    def _find(self, func: OpOverload) -> Counter | None:
        try:
            return registry.find(func, self._attention)
        except UnknownOperator as error:
            if self._unknown == "error":
                raise
            import warnings

            warnings.warn(f"not counted: {error}", stacklevel=2)
            self._uncounted.append(registry.name_of(func))
            return None

    @property
    def counts(self) -> Flops:
        """What was counted so far, over all counted entries."""
        return Flops(**self._totals())

    @property
    def uncounted(self) -> tuple[str, ...]:
        """Operators that were met and have no formula; none with `unknown="error"`."""
        return tuple(self._uncounted)

    @property
    def entries(self) -> int:
        """How often the context was entered; `sampled` of them were counted."""
        return self._entries

    def mfu(self, step_time: float, peak: float) -> float:
        """Model FLOPs utilisation: the FLOPs that the model needs, by what the device could do.

        Args:
            step_time: seconds of one entry (one step).
            peak: FLOP/s of the devices that did the work, see `peak_flops`.

        Raises:
            ValueError: a time or a peak that is not positive, or nothing counted yet.
        """
        return self._rate(self.counts.model, step_time, peak)

    def hfu(self, step_time: float, peak: float) -> float:
        """Hardware FLOPs utilisation: like `mfu`, recomputation included."""
        return self._rate(self.counts.hardware, step_time, peak)

    def _rate(self, flops: int, step_time: float, peak: float) -> float:
        if not self.sampled:
            raise ValueError("nothing is counted yet: enter the meter around a step")
        for name, value in (("step_time", step_time), ("peak", peak)):
            if not value or value <= 0:
                raise ValueError(f"{name}: got {value!r}, need a positive number")
        return flops / self.sampled / (step_time * peak)

    def as_dict(self) -> dict[str, Any]:
        """Everything counted, ready for JSON: in all, by module, by operator and by dtype."""
        total = dict.fromkeys(PHASES[:3], 0) | self._totals()
        return {
            "kind": "flops",
            "version": 1,
            "attention": self._attention,
            "entries": self._entries,
            "sampled": self.sampled,
            "uncounted": list(self._uncounted),
            "total": total,
            "by_module": self._tables("module") if self._follow else {},
            "by_op": self._tables("op"),
            "by_dtype": self._tables("dtype"),
        }

    def _totals(self) -> dict[str, int]:
        self._resolve()
        totals: defaultdict[str, int] = defaultdict(int)
        for place, number in self._counts.items():
            totals[place.phase] += number
        return dict(totals)

    def _tables(self, attribute: str) -> dict[str, dict[str, int]]:
        self._resolve()
        tables: defaultdict[str, defaultdict[str, int]] = defaultdict(lambda: defaultdict(int))
        for place, number in self._counts.items():
            tables[getattr(place, attribute)][place.phase] += number
        return {name: dict(table) for name, table in sorted(tables.items())}

    def _resolve(self) -> None:
        for place, pending in self._pending:
            self._counts[place] += pending.resolve()
        self._pending.clear()


def _dtype(args: Sequence[Any]) -> str:
    """The type of the first tensor, which a product reads."""
    for value in args:
        first = value[0] if isinstance(value, list | tuple) and value else value
        if isinstance(first, Tensor):
            return str(first.dtype).removeprefix("torch.")
    return ""
