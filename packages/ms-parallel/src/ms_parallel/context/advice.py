"""Which algorithm for these heads, this sequence, these links: the fastest plan, and why."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from .build import divisors, plan_attention
from .cost import state_bytes
from .heads import kv_head_plan
from .layout import SeqLayout
from .mask import AttnMask
from .plan import AttnPlan
from .timing import Estimate, Machine, estimate


@dataclass(frozen=True)
class Choice:
    """One way to run an attention.

    Attributes:
        layout: which process holds which tokens.
        arguments: what `plan_attention` takes beside layout, mask, heads and channels.
        time: estimated seconds.
        sent_bytes: what the rank that sends most sends, forward and backward.
        state_bytes: keys and values that the rank that keeps most keeps for backward.
    """

    layout: SeqLayout = field(repr=False)
    arguments: dict[str, Any]
    time: Estimate
    sent_bytes: int
    state_bytes: int

    @property
    def name(self) -> str:
        """The arguments in a few words."""
        a = self.arguments
        words = [a["algorithm"]]
        nodes = a["algorithm"] in ("usp", "allgather_kv", "tasks")
        words += [f"U = {a['ulysses']}"] if nodes else []
        words += [f"w = {a['window']}"] if a["window"] > 1 else []
        words += [f"keeps {a['kv_keep']}"] if a["kv_keep"] != "last" else []
        words += ["pruned"] if a["pruned"] else []
        return ", ".join(words)


@dataclass(frozen=True)
class Advice:
    """The best choice and the others, fastest first.

    Attributes:
        choice: the fastest that fits.
        reason: why, in one sentence with the numbers that decide.
        others: everything else that was tried.
        layouts: those there were to choose from.
    """

    choice: Choice
    reason: str
    others: tuple[Choice, ...]
    layouts: tuple[SeqLayout, ...] = field(repr=False)

    def __str__(self) -> str:
        """Return a table of what was tried."""
        rows = [["", "total", "compute", "exposed", "sent", "kept"]]
        for c in (self.choice, *self.others):
            times = (c.time.total_s, c.time.compute_s, c.time.exposed_s)
            sizes = (f"{c.sent_bytes / 2**20:.1f} MiB", f"{c.state_bytes / 2**20:.1f} MiB")
            layout = f"layout {self.layouts.index(c.layout)}: " if len(self.layouts) > 1 else ""
            rows.append([layout + c.name, *(f"{s * 1e3:.3f} ms" for s in times), *sizes])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])])
            for row in rows
        ]
        return "\n".join([*lines, "", self.reason])


def advise(
    layout: SeqLayout | Sequence[SeqLayout],
    mask: AttnMask,
    machine: Machine,
    *,
    heads: tuple[int, int],
    head_dims: tuple[int, int],
    element_bytes: int = 2,
    batch: int = 1,
    grad_bytes: int = 4,
    spare_bytes: int = 0,
    even_heads: bool = False,
) -> Advice:
    """Return the fastest way to run an attention, by an estimate of every sensible one.

    First every U with a plain ring, a gather, or tasks (where tiles are empty); then, for the two
    best, windows (where messages are not hidden already); then, for the best, pruned traffic and
    what to keep. Of those that are equally fast, to three digits, the one that keeps least for
    backward, then the one that sends least.

    Args:
        layout: which process holds which tokens, or several such layouts to choose from.
        mask: which keys a query may attend to.
        machine: rates.
        heads: query heads, and key and value heads of one process.
        head_dims: channels of queries and keys, and of values.
        element_bytes: bytes per element.
        batch: rows of the batch.
        grad_bytes: bytes per element of travelling partial sums.
        spare_bytes: memory of a rank for keys and values that this attention may keep for
            backward, beyond what the plans do that keep least.
        even_heads: only U that divide the query heads.
    """
    layouts = (layout,) if isinstance(layout, SeqLayout) else tuple(layout)
    search = _Search(mask, machine, heads, head_dims, element_bytes, batch, grad_bytes)
    base: list[Choice] = []
    for one in layouts:
        legal = [u for u in divisors(one.size) if u <= heads[0] or u == 1]
        legal = [u for u in legal if heads[0] % u == 0 or not even_heads]
        base += [search.tried(one, u) for u in legal]
        base += [search.tried(one, u, algorithm=a) for u in legal for a in search.others(one, u)]
    found = sorted(base, key=_order)
    for choice in found[:2]:
        more = _windows(choice)
        found += [search.tried(choice.layout, **arguments) for arguments in more]
    best = min(found, key=_order)
    found += [search.tried(best.layout, **arguments) for arguments in _policies(best, heads)]
    limit = max(c.state_bytes for c in base) + spare_bytes
    fitting = sorted((c for c in found if c.state_bytes <= limit), key=_order)
    over = sorted((c for c in found if c.state_bytes > limit), key=_order)
    return Advice(fitting[0], _reason(fitting[0], fitting), (*fitting[1:], *over), layouts)


@dataclass(frozen=True)
class _Search:
    """What all choices share."""

    mask: AttnMask
    machine: Machine
    heads: tuple[int, int]
    head_dims: tuple[int, int]
    element_bytes: int
    batch: int
    grad_bytes: int

    def plan(self, layout: SeqLayout, arguments: dict[str, Any]) -> AttnPlan:
        """Return the plan of a choice."""
        return plan_attention(
            layout, self.mask, heads=self.heads, head_dims=self.head_dims,
            grad_bytes=self.grad_bytes, **arguments,
        )  # fmt: skip

    def tried(self, layout: SeqLayout, ulysses: int, **more: Any) -> Choice:
        """Return a choice and what it takes."""
        arguments = _arguments(layout.size, ulysses, **more)
        plan = self.plan(layout, arguments)
        time = estimate(plan, self.machine, self.element_bytes, self.batch)
        cost = plan.cost(self.element_bytes, self.batch)
        sent = max(c.forward_bytes + c.backward_bytes for c in cost)
        ranks = range(layout.size)
        kept = max(state_bytes(plan, r, self.element_bytes, self.batch) for r in ranks)
        return Choice(layout, arguments, time, sent, kept)

    def others(self, layout: SeqLayout, ulysses: int) -> list[str]:
        """Return what else may serve the nodes of a plain ring."""
        plan = self.plan(layout, _arguments(layout.size, ulysses))
        if plan.nodes.size == 1:
            return []
        tiles = sum(bool(step.blocks) for steps in plan.forward.steps for step in steps)
        return ["allgather_kv", *(["tasks"] if tiles < plan.nodes.size**2 else [])]


def _arguments(
    size: int,
    ulysses: int,
    algorithm: str = "",
    window: int = 1,
    kv_keep: str = "last",
    pruned: bool = False,
) -> dict[str, Any]:
    plain = "ring" if ulysses == 1 else "ulysses" if ulysses == size else "usp"
    return {
        "algorithm": algorithm or plain,
        "ulysses": ulysses,
        "window": window,
        "kv_keep": kv_keep,
        "pruned": pruned,
    }


def _order(choice: Choice) -> tuple[float, int, int, str]:
    seconds = float(f"{choice.time.total_s:.3g}")
    return seconds, choice.state_bytes, choice.sent_bytes, choice.name


def _windows(choice: Choice) -> Iterable[dict[str, Any]]:
    given = choice.arguments
    waits = choice.time.exposed_s - choice.time.collective_s > 1e-3 * choice.time.total_s
    if given["algorithm"] not in ("ring", "usp") or not waits:
        return []
    legal = divisors(choice.layout.size // given["ulysses"])[1:-1]
    return [{"ulysses": given["ulysses"], "window": w} for w in legal]


def _policies(choice: Choice, heads: tuple[int, int]) -> Iterable[dict[str, Any]]:
    given = choice.arguments
    same = {k: given[k] for k in ("algorithm", "ulysses", "window")}
    if given["algorithm"] == "ulysses":
        shared = kv_head_plan(*heads, given["ulysses"]).shared
        return [{**same, "kv_keep": keep} for keep in ("pre", "pre_k")] if shared else []
    keeps = [{**same, "kv_keep": keep} for keep in ("last", "k", "kv")]
    if given["algorithm"] not in ("ring", "usp"):
        return keeps[1:]
    return [*keeps[1:], *({**more, "pruned": True} for more in keeps)]


def _reason(choice: Choice, found: Iterable[Choice]) -> str:
    """Say what the choice takes, and what each of its options and other algorithms would change."""
    time = choice.time
    text = (
        f"{choice.name}: {time.total_s * 1e3:.3f} ms, {time.exposed_s * 1e3:.3f} ms of them"
        " messages and collectives that no compute hides"
    )
    given = choice.arguments
    for name, default in (("window", 1), ("kv_keep", "last"), ("pruned", False)):
        without = {**given, name: default}
        same = (c for c in found if c.layout == choice.layout)
        other = next((c for c in same if c.arguments == without), None)
        if given[name] != default and other is not None:
            text += f"; without {name} = {given[name]!r} {other.time.total_s * 1e3:.3f} ms"
    best: dict[str, Choice] = {}
    for other in sorted(found, key=_order):
        best.setdefault(other.arguments["algorithm"], other)
    for name, other in best.items():
        if name != given["algorithm"]:
            text += f"; the best of {name} {other.time.total_s * 1e3:.3f} ms"
    return text + "."
