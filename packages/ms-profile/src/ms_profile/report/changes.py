"""What changed between two runs, per step and rank, so that windows of unlike length compare."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from ms_profile.report.summary import Kinds, RankSummary, RunSummary


@dataclass(frozen=True)
class Change:
    """One figure in both runs; None where a run does not have it.

    Attributes:
        name: What it is the figure of.
        before: In the first run.
        after: In the second run.
    """

    name: str
    before: float | None
    after: float | None

    @property
    def difference(self) -> float:
        """After minus before, with 0 for what is not there."""
        return (self.after or 0) - (self.before or 0)

    @property
    def state(self) -> str:
        """`new`, `gone`, or empty."""
        if self.before is None:
            return "new"
        return "gone" if self.after is None else ""


@dataclass(frozen=True)
class Comparison:
    """Two runs side by side. Every list begins with the largest change.

    Attributes:
        before: Folder of the first run.
        after: Folder of the second run.
        times: Step time and kinds of time, seconds per step, mean of the ranks.
        operators: Self time, seconds per step, mean of the ranks.
        calls: Calls of operators per step, mean of the ranks.
        communication: Bytes on the wire by `group op`, over all ranks.
        memory: Peak bytes per rank.
        flops: FLOPs by module, over all ranks.
        notes: Figures that one run alone has; they are not compared.
    """

    before: str
    after: str
    times: tuple[Change, ...]
    operators: tuple[Change, ...]
    calls: tuple[Change, ...]
    communication: tuple[Change, ...]
    memory: tuple[Change, ...]
    flops: tuple[Change, ...]
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """The comparison as JSON-able data."""
        return {"kind": "comparison", "version": 1, **asdict(self)}


def compare(before: RunSummary, after: RunSummary) -> Comparison:
    """Compares two runs figure by figure."""
    found: dict[str, tuple[Change, ...]] = {}
    notes: list[str] = []
    for name, figures in _FIGURES.items():
        old, new = figures(before), figures(after)
        if bool(old) != bool(new):
            notes.append(f"{name}: only {before.path if old else after.path} has it")
            old, new = {}, {}
        found[name] = _in_order(old, new) if name == "times" else changes(old, new)
    return Comparison(before.path, after.path, **found, notes=tuple(notes))


def changes(before: Mapping[str, float], after: Mapping[str, float]) -> tuple[Change, ...]:
    """One change per name of either run, the largest difference first."""
    rows = _in_order(before, after)
    return tuple(sorted(rows, key=lambda row: (-abs(row.difference), row.name)))


def _in_order(before: Mapping[str, float], after: Mapping[str, float]) -> tuple[Change, ...]:
    return tuple(Change(n, before.get(n), after.get(n)) for n in {**before, **after})


def _per_step(rank: RankSummary) -> int:
    # A trace without steps is compared as one.
    return max(rank.steps, 1)


def _times(run: RunSummary) -> dict[str, float]:
    rows: dict[str, list[float]] = {}
    for rank in run.ranks:
        if rank.step_s is not None:
            rows.setdefault("step_s", []).append(rank.step_s)
        if isinstance(rank.kinds, Kinds):
            for name, value in asdict(rank.kinds).items():
                rows.setdefault(name, []).append(value / _per_step(rank))
    return {name: fmean(values) for name, values in rows.items()}


def _operators(run: RunSummary, figure: str) -> dict[str, float]:
    traced = [rank for rank in run.ranks if rank.operators]
    sums: dict[str, float] = {}
    for rank in traced:
        for row in rank.operators:
            share = getattr(row, figure) / _per_step(rank) / len(traced)
            sums[row.name] = sums.get(row.name, 0.0) + share
    return sums


def _communication(run: RunSummary) -> dict[str, float]:
    rows = ((f"{c.group} {c.op}", c.wire_bytes) for rank in run.ranks for c in rank.comm_bytes)
    return _summed(rows)


def _memory(run: RunSummary) -> dict[str, float]:
    return {f"rank {r.rank}": r.memory.bytes for r in run.ranks if r.memory is not None}


def _flops(run: RunSummary) -> dict[str, float]:
    return _summed(
        (module, sum(phases.values()))
        for rank in run.ranks
        for module, phases in rank.flops.items()
    )


def _summed(rows: Iterable[tuple[str, float]]) -> dict[str, float]:
    sums: dict[str, float] = {}
    for name, value in rows:
        sums[name] = sums.get(name, 0) + value
    return sums


_FIGURES: Mapping[str, Callable[[RunSummary], Mapping[str, float]]] = {
    "times": _times,
    "operators": lambda run: _operators(run, "self_s"),
    "calls": lambda run: _operators(run, "calls"),
    "communication": _communication,
    "memory": _memory,
    "flops": _flops,
}
