"""A plan of memory: frozen data that is printed, saved, compared between ranks and installed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ..errors import refuse
from .problem import Option, option_from_dict

MS = 1e6  # nanoseconds


@dataclass(frozen=True, slots=True)
class Decision:
    """What happens to a site.

    Attributes:
        site: its name.
        option: what was chosen.
        freed: bytes less than unplanned at the event of the unplanned peak.
        cheaper: how many other options of the site would add less time, but not fit together.
    """

    site: str
    option: Option
    freed: int
    cheaper: int


@dataclass(frozen=True, slots=True)
class Point:
    """The least time added at a budget; `time` None: no plan fits. `proven`: nothing is faster."""

    budget: int
    time: int | None
    proven: bool = True


@dataclass(frozen=True)
class Plan:
    """What to do with every site so that no event of the step needs more than the budget.

    Attributes:
        decisions: in the order of sites.
        budget: bytes on the device.
        host_budget: pinned bytes, None: unlimited.
        time: nanoseconds added to the step.
        bound: nanoseconds that any plan within the budget adds at least.
        proven: nothing is faster, and of the equally fast ones none needs fewer host bytes.
        host: pinned bytes.
        events: names of the events of a step.
        live: bytes alive at each.
        unplanned: likewise without a plan.
        minimum: the smallest budget that has a plan.
        min_bytes: storages below are not swapped.
        shadow: time at a smaller and at a larger budget.
        curve: the least time over budgets between the minimum and the unplanned peak.
    """

    decisions: tuple[Decision, ...]
    budget: int
    host_budget: int | None
    time: int
    bound: int
    proven: bool
    host: int
    events: tuple[str, ...]
    live: tuple[int, ...]
    unplanned: tuple[int, ...]
    minimum: int
    min_bytes: int = 0
    shadow: tuple[Point, ...] = ()
    curve: tuple[Point, ...] = ()

    @property
    def peak(self) -> int:
        """Return the most bytes alive at any event."""
        return max(self.live)

    @property
    def peak_event(self) -> str:
        """Return the first event with that many."""
        return self.events[self.live.index(self.peak)]

    @property
    def stall(self) -> int:
        """Return the nanoseconds of `time` that copies hold the step up, at most."""
        return sum(decision.option.stall for decision in self.decisions)

    @property
    def gap(self) -> float:
        """Return how much slower than the bound the plan may be: 0.0 when it is proven."""
        return 0.0 if self.proven else (self.time - self.bound) / max(self.bound, 1)

    def actions(self) -> dict[str, str]:
        """Return what is to be installed: part of a site -> action; what is kept is left out."""
        return {
            part: action
            for decision in self.decisions
            for part, action in decision.option.actions
            if action != "keep"
        }

    @property
    def digest(self) -> str:
        """Return a digest of what is decided: equal in all processes that hold equal plans."""
        decided = [
            self.budget,
            self.min_bytes,
            [(d.site, asdict(d.option)) for d in self.decisions],
        ]
        text = json.dumps(decided, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def as_dict(self) -> dict[str, Any]:
        """Return lists, strings and numbers, for JSON."""
        return {**asdict(self), "peak": self.peak, "digest": self.digest}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Plan:
        """Read what `as_dict` gave.

        Raises:
            MemoryFeatureError: E-M31, the digest is not that of the data.
        """
        fields = {k: v for k, v in data.items() if k not in ("peak", "digest")}
        for name in ("events", "live", "unplanned"):
            fields[name] = tuple(fields[name])
        for name in ("shadow", "curve"):
            fields[name] = tuple(Point(**point) for point in fields[name])
        fields["decisions"] = tuple(
            Decision(**{**d, "option": option_from_dict(d["option"])}) for d in fields["decisions"]
        )
        plan = cls(**fields)
        if plan.digest != data["digest"]:
            refuse(
                "E-M31",
                f"the saved digest is {data['digest'][:12]}, that of the data {plan.digest[:12]}",
                "save the plan again with as_dict(), or solve again",
            )
        return plan

    def check_agreement(self, digests: Mapping[int, str]) -> None:
        """Raise E-M31 unless every rank's digest is this plan's.

        Args:
            digests: rank -> digest of its plan.
        """
        others = [rank for rank, digest in digests.items() if digest != self.digest]
        if others:
            refuse(
                "E-M31",
                f"ranks {others} hold other plans than {self.digest[:12]}",
                "solve on one rank from the profiles' maxima, and broadcast plan.as_dict()",
            )

    def __str__(self) -> str:
        """Return the report."""
        from .report import text

        return text(self)
