"""Install a plan, compare its prediction with a step, and guard it against larger inputs."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import distributed as dist
from torch import nn

from ..device import Device, Sim
from ..errors import refuse
from ..session import Session
from .measure import record
from .options import AFTER, BEFORE
from .parts import PARTS, Part, install
from .plan import Plan
from .profile import ACTIONS, MIN_BYTES, Profile, profile, tensor_bytes
from .report import size, text
from .solve import solve

log = logging.getLogger("ms_memory")


@dataclass(frozen=True)
class Verified:
    """A step under the plan, measured.

    Attributes:
        predicted: most bytes alive, by the plan.
        measured: likewise, by the census of storages.
        stall: nanoseconds that the step waited for copies; None: the device does not tell. The plan
            says `plan.stall` at most.
    """

    predicted: int
    measured: int
    stall: int | None = None


def apply(
    session: Session | Sequence[Session],
    plan: Plan,
    *,
    group: dist.ProcessGroup | None = None,
    parts: Sequence[Part] = PARTS,
) -> None:
    """Install what a plan decides, until the session is closed.

    Args:
        session: of the model that was profiled; the sessions of all chunks, in the order of
            `joined`.
        plan: what to do.
        group: processes that must hold the same plan.
        parts: as for `profile`.

    Raises:
        MemoryFeatureError: E-M31, a process of the group holds another plan; E-M22, E-M10, E-M05
            as the actions themselves.
        RuntimeError: a swap, and the model is on the processor.
        ValueError: the plan has an action that cannot be installed.
    """
    several = not isinstance(session, Session)
    sessions = [session] if isinstance(session, Session) else list(session)
    if group is not None:
        plan.check_agreement(_digests(plan.digest, group, sessions[0].device))
    prefixes = [f"{number}:" for number in range(len(sessions))] if several else [""]
    actions = plan.actions()
    if any(not name.startswith(tuple(prefixes)) for name in actions):
        raise ValueError(f"apply: session: got {len(sessions)}, need one for each planned chunk")
    for one, prefix in zip(sessions, prefixes, strict=True):
        mine = {n.removeprefix(prefix): a for n, a in actions.items() if n.startswith(prefix)}
        install(one, mine, _layers(plan, prefix), plan.min_bytes, parts)


def _layers(plan: Plan, prefix: str = "") -> list[str]:
    """Return the layers of a chunk, in the order of forward."""
    sites = [d.site.removeprefix(prefix) for d in plan.decisions if d.site.startswith(prefix)]
    return [site for site in sites if site not in (BEFORE, AFTER)]


def _digests(digest: str, group: dist.ProcessGroup, device: Device) -> dict[int, str]:
    """Return the digest of every rank of the group."""
    on = torch.device("cpu" if dist.get_backend(group) == "gloo" else device.name)
    mine = torch.tensor(list(bytes.fromhex(digest)), dtype=torch.uint8, device=on)
    all_of_them = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(all_of_them, mine, group=group)
    return {rank: bytes(found.tolist()).hex() for rank, found in enumerate(all_of_them)}


def verify(where: nn.Module | Session, step: Callable[[], object], plan: Plan) -> Verified:
    """Measure one step of a model under its plan; random states, buffers, gradients stay.

    What the plan counts beside the step (`extra` of `Profile.problem`) is taken to be as said.

    Args:
        where: the session in which the plan is installed, or its model.
        step: as for `profile`.
        plan: what is installed.
    """
    model, sources, clock = where, None, None
    if isinstance(where, Session):
        model, sources = where.model, where.sources
        clock = where.device.clock if isinstance(where.device, Sim) else None
    assert isinstance(model, nn.Module)
    before = 0 if clock is None else clock.stalled
    phases = record(model, step, (), time.perf_counter_ns, count=True, sources=sources)
    extra = plan.live[-1] - phases[-1].start
    peak = max(phase.peak for phase in phases) + extra
    return Verified(plan.peak, peak, None if clock is None else clock.stalled - before)


class Installed:
    """A plan at work, until `close()`; a context manager.

    Attributes:
        plan: what was decided.
        profile: what it was decided by.
        session: owns what was installed.
        verified: a step under the plan.
        fallen_back: the inputs outgrew the profile, and every layer is recomputed since.
    """

    def __init__(
        self,
        model: nn.Module,
        found: Profile,
        plan: Plan,
        *,
        strict: bool,
        device: str | torch.device | Device = "auto",
    ) -> None:
        self.plan, self.profile = plan, found
        self.verified: Verified | None = None
        self.fallen_back = False
        self._model, self._strict, self._device = model, strict, device
        self.session = Session(model, device=device)
        apply(self.session, plan)
        self._guard = model.register_forward_pre_hook(self._check, with_kwargs=True)

    def __enter__(self) -> Installed:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __str__(self) -> str:
        """Return the plan's report, and the measured peak."""
        lines = [text(self.plan)]
        if self.verified is not None:
            measured, predicted = self.verified.measured, self.verified.predicted
            lines.append(f"\npredicted peak {size(predicted)}, measured {size(measured)}")
        return "\n".join(lines)

    def close(self) -> None:
        """Undo everything; a second call does nothing."""
        self._guard.remove()
        self.session.close()

    def _check(self, model: nn.Module, args: object, kwargs: object) -> None:
        nbytes = tensor_bytes((args, kwargs))
        if nbytes <= self.profile.input_bytes or self.fallen_back:
            return
        where = f"inputs of {nbytes:,} bytes, planned for {self.profile.input_bytes:,}"
        if self._strict:
            refuse("E-M23", where, "profile with the largest inputs, or pass strict=False")
        log.warning("%s: every layer is recomputed from here on", where)
        self.fallen_back = True
        self.session.close()
        self.session = Session(model, device=self._device)
        layers = _layers(self.plan)
        install(self.session, dict.fromkeys(layers, "recompute"), layers, self.plan.min_bytes)


def plan(
    model: nn.Module,
    step: Callable[[], object],
    budget: int,
    *,
    layers: Sequence[str] | None = None,
    actions: Collection[str] = ACTIONS,
    pins: Mapping[str, str] | None = None,
    in_flight: int = 1,
    extra: int = 0,
    strict: bool = False,
    min_bytes: int = MIN_BYTES,
    device: str | torch.device | Device = "auto",
    clock: Callable[[], int] | None = None,
) -> Installed:
    """Profile a model, find the fastest plan within a budget, install it and measure a step.

    Args:
        model: in no open session.
        step: runs the forward and returns the loss, or runs the backward as well.
        budget: bytes: parameters, buffers, gradients, activations, and `extra`.
        layers: see `profile`.
        actions: which may be used: "discard" (norms, activation), "recompute" (the layer, its
            attention, its MLP), "swap" (what these save).
        pins: see `solve`.
        in_flight: micro-batches between their forward and backward.
        extra: bytes that the step does not show: optimizer state, communication buffers.
        strict: refuse inputs larger than the profiled ones; otherwise every layer is recomputed
            from then on.
        min_bytes: storages below are not swapped.
        device: where the model is, see `Session`.
        clock: see `profile`.

    Returns:
        What is installed; `print` it for the report, `close()` it to undo.

    Raises:
        MemoryFeatureError: E-M30, the budget is too small; E-M22, nothing to plan was found;
            E-M20, the model is in another open session.
    """
    with Session(model, device=device) as session:
        found = profile(
            session, step, layers=layers, actions=tuple(actions), min_bytes=min_bytes, clock=clock
        )
    problem = found.problem(in_flight=in_flight, extra=extra)
    limit = budget
    for last in (False, True):
        made = solve(problem, limit, actions=actions, pins=pins)
        installed = Installed(model, found, made, strict=strict, device=device)
        # One step shows the peak of one micro-batch only.
        installed.verified = verify(installed.session, step, made) if in_flight == 1 else None
        over = 0 if installed.verified is None else installed.verified.measured - budget
        if over <= 0 or last:
            break
        installed.close()
        limit -= over
    if over > 0:
        log.warning("the step needs %s more than the budget", size(over))
    return installed
