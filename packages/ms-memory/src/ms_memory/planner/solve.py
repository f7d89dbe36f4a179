"""From a problem and a budget of bytes to the plan that adds the least time."""

from __future__ import annotations

import difflib
import fnmatch
import time as clocks
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace

from ..errors import refuse
from .plan import Decision, Plan, Point
from .problem import Option, Problem, Site
from .search import Found, cheapest, least_budget
from .table import Table

ACTIONS = ("keep", "discard", "recompute", "swap")
GIB = 1 << 30
CURVE_POINTS = 8


def solve(
    problem: Problem,
    budget: int,
    *,
    actions: Collection[str] = ACTIONS,
    host_budget: int | None = None,
    pins: Mapping[str, str] | None = None,
    time_limit: float = 10.0,
    clock: Callable[[], float] = clocks.monotonic,
    explain: bool = True,
) -> Plan:
    """Find the plan that adds the least time and needs at most `budget` bytes at every event.

    The plan is exact: whole bytes, whole nanoseconds. Of equally fast plans the one with fewer
    host bytes is taken, of those the first that the search meets; equal input, equal plan.

    Args:
        problem: see `chain`, or `profile(...).problem()`.
        budget: bytes on the device, of everything that the problem counts.
        actions: which the plan may use; "keep" always may.
        host_budget: pinned bytes on the host; None: unlimited.
        pins: pattern of site or part names -> action (or option name) that it must have.
        time_limit: seconds; afterwards the best plan so far, with its bound and gap. What explains
            the plan (shadow prices, curve) takes at most as long again.
        clock: returns seconds.
        explain: also compute shadow prices and the curve.

    Raises:
        MemoryFeatureError: E-M30 the budget is below the smallest that has a plan (the message
            states it); E-M32 the pins need more host bytes than allowed; E-M22 a pin matches
            nothing.
    """
    allowed = restrict(problem, actions, pins or {})
    table = Table.of(allowed, host=host_budget is not None)
    if host_budget is not None and table.floor[-1] > host_budget:
        refuse(
            "E-M32",
            f"the plan needs {table.floor[-1]:,} bytes at least, allowed are {host_budget:,}",
            "raise host_budget, or pin fewer sites to swap",
        )
    minimum = least_budget(table, host_budget)
    if budget < minimum:
        _infeasible(problem, budget, minimum)
    found = _search(table, budget, host_budget, time_limit, clock)
    if found.picks is None:
        refuse(
            "E-M30",
            f"no plan was found within {time_limit} s for {budget:,} bytes, though one exists",
            f"raise time_limit, or the budget (the minimum is {minimum:,} bytes)",
        )
    plan = _plan(problem, allowed, table, found, (budget, host_budget, minimum))
    if not explain:
        return plan
    return _explained(plan, table, time_limit, clock)


def restrict(problem: Problem, actions: Collection[str], pins: Mapping[str, str]) -> Problem:
    """Drop the options that are not allowed, or not what a pin says."""
    unknown = sorted(set(actions) - set(ACTIONS))
    if unknown:
        raise ValueError(f"solve: actions: got {unknown}, need some of {list(ACTIONS)}")
    _check_pins(problem, pins)
    return replace(problem, sites=tuple(_restricted(s, actions, pins) for s in problem.sites))


def _restricted(site: Site, actions: Collection[str], pins: Mapping[str, str]) -> Site:
    forbidden = set(ACTIONS) - {"keep", *actions}
    # Where nothing can be decided, as before the layers, a pattern like "*" means nothing.
    alone = len(site.options) == 1 and not site.options[0].actions
    mine = {} if alone else {p: action for p, action in pins.items() if _touches(site, p)}
    options = tuple(
        option
        for option in site.options
        if forbidden.isdisjoint(action for _, action in _parts(site, option))
        and all(_obeys(site, option, p, action) for p, action in mine.items())
    )
    if not options:
        refuse(
            "E-M22",
            f"site {site.name} has no option that is allowed (actions {sorted(actions)},"
            f" pins {mine}); it has {[o.name for o in site.options]}",
            "allow more actions, or change the pins",
        )
    return replace(site, options=options)


def _parts(site: Site, option: Option) -> tuple[tuple[str, str], ...]:
    return option.actions or ((site.name, option.name),)


def _touches(site: Site, pattern: str) -> bool:
    names = {site.name, *(part for option in site.options for part, _ in option.actions)}
    return any(fnmatch.fnmatchcase(name, pattern) for name in names)


def _obeys(site: Site, option: Option, pattern: str, action: str) -> bool:
    if fnmatch.fnmatchcase(site.name, pattern):
        if any(action == one.name for one in site.options):
            return action == option.name
        return {a for _, a in _parts(site, option)} == {action}
    done = {part: a for part, a in option.actions if fnmatch.fnmatchcase(part, pattern)}
    return set(done.values() or ["keep"]) == {action}


def _check_pins(problem: Problem, pins: Mapping[str, str]) -> None:
    names = [s.name for s in problem.sites]
    names += [part for s in problem.sites for o in s.options for part, _ in o.actions]
    for pattern in pins:
        if not any(_touches(site, pattern) for site in problem.sites):
            near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.3)
            refuse(
                "E-M22", f"pin {pattern!r}", f"name a site; near it: {', '.join(near) or names[:3]}"
            )


def _infeasible(problem: Problem, budget: int, minimum: int) -> None:
    peak = max(problem.live([0] * len(problem.sites)))
    refuse(
        "E-M30",
        f"{budget:,} bytes; the smallest budget that has a plan is {minimum:,} bytes"
        f" (unplanned the step needs {peak:,})",
        f"raise the budget to {minimum:,} bytes, allow more actions, or remove pins",
    )


def _search(
    table: Table,
    budget: int,
    host_budget: int | None,
    seconds: float,
    clock: Callable[[], float],
) -> Found:
    end = clock() + seconds
    return cheapest(table, table.rooms(budget, host_budget), lambda: clock() > end)


def _plan(
    problem: Problem,
    allowed: Problem,
    table: Table,
    found: Found,
    limits: tuple[int, int | None, int],
) -> Plan:
    picks = found.picks or ()
    unplanned = problem.live([0] * len(problem.sites))
    top = unplanned.index(max(unplanned))
    decisions = tuple(
        Decision(
            site.name,
            site.options[pick],
            whole[0][top] - uses[pick][top],
            sum(o.time < site.options[pick].time for o in site.options),
        )
        for site, uses, whole, pick in zip(
            allowed.sites, allowed.uses, problem.uses, picks, strict=True
        )
    )
    budget, host_budget, minimum = limits
    return Plan(
        decisions,
        budget,
        host_budget,
        time=sum(d.option.time for d in decisions),
        bound=found.lower // table.unit,
        proven=found.proven,
        host=sum(d.option.host for d in decisions),
        events=problem.events,
        live=allowed.live(picks),
        unplanned=unplanned,
        minimum=minimum,
        min_bytes=problem.min_bytes,
    )


def _explained(plan: Plan, table: Table, seconds: float, clock: Callable[[], float]) -> Plan:
    """Add what other budgets would cost, as far as the time allows."""
    end = clock() + seconds
    step = min(GIB, max(1, plan.budget // 16))
    top = max(plan.unplanned)
    span = max(0, top - plan.minimum)
    budgets = [plan.minimum + span * i // (CURVE_POINTS - 1) for i in range(CURVE_POINTS)]

    def points(asked: Sequence[int]) -> tuple[Point, ...]:
        return tuple(
            _point(table, budget, plan.host_budget, end - clock(), clock)
            for budget in asked
            if clock() <= end
        )

    shadow = points([plan.budget - step, plan.budget + step])
    return replace(plan, shadow=shadow, curve=points(sorted(set(budgets))))


def _point(
    table: Table,
    budget: int,
    host_budget: int | None,
    seconds: float,
    clock: Callable[[], float],
) -> Point:
    found = _search(table, budget, host_budget, seconds, clock)
    if found.picks is None:
        return Point(budget, None, found.proven)
    return Point(budget, table.cost(found.picks) // table.unit, found.proven)
