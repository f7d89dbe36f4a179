"""Run a function in several processes joined by torch.distributed, in about 0.1 s a test.

    def body(rank, world_size, size):
        x = torch.full((size,), float(rank))
        torch.distributed.all_reduce(x)
        return x

    def test_sum():
        assert run_ranks(body, 4, 3)[0].tolist() == [6.0, 6.0, 6.0]

`body` is a module-level function, also of the test file itself; arguments and results are pickled.
`preload="megatron"` forks from a process in which `mindspeed.device.install("cpu")` has run and
`megatron.core` is imported, so that a test of Megatron does not pay that import in every rank.
The test process itself is never changed by either. What Megatron compiles runs eager there: it
computes the same and needs no compiler; `env=COMPILED` compiles.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import pickle
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from support.forkserver import ForkServer, server
from support.mutation import Mutation
from support.rank_child import Call, Failure, fault_point

__all__ = ["COMPILED", "Outcome", "RankError", "fault_point", "rank_outcomes", "run_ranks"]

PRELOADS: Mapping[str, tuple[str, ...]] = {
    # The first operator under a dispatch mode imports torch._dynamo, a second of work per rank.
    "torch": (
        "torch",
        "torch._dynamo",
        "torch.distributed",
        "support.preload_libraries",
        "support.rank_child",
    ),
    "megatron": (
        "torch",
        "torch.distributed",
        "support.preload_megatron",
        "support.preload_libraries",
        "support.rank_child",
    ),
}
# torch.compile costs each rank 1 to 3 s of work, and is what few tests of Megatron are about.
EAGER = {"TORCHDYNAMO_DISABLE": "1"}
COMPILED = {"TORCHDYNAMO_DISABLE": "0"}
ENVIRONMENTS: Mapping[str, Mapping[str, str]] = {"torch": {}, "megatron": EAGER}
CAUSES = ("killed", "error", "timeout")  # a status is seldom the consequence of a later one
SETTLE_S = 0.25  # the rank that failed first may be the second whose exit is seen
STACK_S = 0.3  # for a hung rank to write its stacks before it is killed


@dataclass(frozen=True)
class Outcome:
    """How one rank ended.

    Attributes:
        rank: Its number.
        status: "ok"; "error" (it raised); "killed" (ended by a signal or exit without outcome);
            "timeout" (still running at the time limit); "stopped" (ended because another failed).
        value: What the function returned, if ok.
        error: One line for a reader, if not ok.
        detail: Traceback or stacks, if there are any.
        output: What it printed.
        at: When it ended, seconds after the start.
    """

    rank: int
    status: Literal["ok", "error", "killed", "timeout", "stopped"]
    value: Any = None
    error: str = ""
    detail: str = ""
    output: str = ""
    at: float = 0.0


class RankError(AssertionError):
    """A rank failed; the message holds the first failing rank's traceback."""

    def __init__(self, outcomes: Sequence[Outcome]) -> None:
        failed = [outcome for outcome in outcomes if outcome.status not in ("ok", "stopped")]
        # Peers see the closed sockets of a killed rank before its death is reported.
        first = min(failed, key=lambda outcome: (CAUSES.index(outcome.status), outcome.at))
        others = [f"rank {o.rank}: {o.status} {o.error}" for o in outcomes if o is not first]
        parts = [
            f"rank {first.rank} of {len(outcomes)} failed first ({first.status}): {first.error}",
            first.detail,
            f"--- output of rank {first.rank}\n{first.output[-4000:]}" if first.output else "",
            "--- others\n" + "\n".join(others) if others else "",
        ]
        super().__init__("\n".join(part for part in parts if part))
        self.outcomes = tuple(outcomes)
        self.first = first


def run_ranks(
    fn: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout: float = 60,
    backend: str | None = "gloo",
    preload: str = "torch",
    kill_at: tuple[int, int] | None = None,
    env: Mapping[str, str] | None = None,
    mutate: Sequence[Mutation] = (),
) -> list[Any]:
    """Run `fn(rank, world_size, *args)` in `world_size` processes; returns results by rank.

    Each rank has one thread, seed 0, and the test process's directory, sys.path and environment
    (plus `env`). When one rank fails the others are killed.

    Args:
        fn: Module-level function.
        world_size: Number of processes.
        *args: Picklable arguments.
        timeout: Seconds for the whole call, and the timeout of the process group.
        backend: Backend of the default group, joined through a file store; None joins no group.
        preload: Key of `PRELOADS`.
        kill_at: `(rank, step)`: that rank dies by SIGKILL in `fault_point(step)`.
        env: Further environment variables, such as `COMPILED`.
        mutate: Mutations applied in every rank before `fn` runs.

    Raises:
        RankError: A rank raised, died or was still running at the timeout.
    """
    outcomes = _run(fn, world_size, args, timeout, backend, preload, kill_at, env, mutate, True)
    if any(outcome.status != "ok" for outcome in outcomes):
        raise RankError(outcomes)
    return [outcome.value for outcome in outcomes]


def rank_outcomes(
    fn: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout: float = 60,
    backend: str | None = "gloo",
    preload: str = "torch",
    kill_at: tuple[int, int] | None = None,
    env: Mapping[str, str] | None = None,
    mutate: Sequence[Mutation] = (),
) -> list[Outcome]:
    """Like `run_ranks`, for fault tests: lets the other ranks go on, and judges nothing."""
    return _run(fn, world_size, args, timeout, backend, preload, kill_at, env, mutate, False)


def _run(
    fn: Callable[..., Any],
    world_size: int,
    args: tuple[Any, ...],
    timeout: float,
    backend: str | None,
    preload: str,
    kill_at: tuple[int, int] | None,
    env: Mapping[str, str] | None,
    mutate: Sequence[Mutation],
    stop_on_failure: bool,
) -> list[Outcome]:
    directory = Path(tempfile.mkdtemp(prefix="ranks-"))
    try:
        call = Call(
            *_address(fn),
            arguments=pickle.dumps(args),
            world_size=world_size,
            backend=backend,
            timeout=timeout,
            path=tuple(sys.path),
            environ={
                **os.environ,
                "OMP_NUM_THREADS": "1",
                **ENVIRONMENTS[preload],
                **(env or {}),
            },
            cwd=os.getcwd(),
            kill_at=kill_at,
            mutations=tuple(mutate),
        )
        (directory / "call").write_bytes(pickle.dumps(call))
        outcomes = _Watch(directory, world_size, timeout, stop_on_failure).run(
            server(PRELOADS[preload])
        )
        for outcome in outcomes:
            if outcome.output and outcome.status == "ok":
                print(f"--- output of rank {outcome.rank}\n{outcome.output}")
        return outcomes
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _address(fn: Callable[..., Any]) -> tuple[str, str, str]:
    """Module name, file and qualified name, by which a rank finds the function again."""
    if "<" in fn.__qualname__:
        raise TypeError(f"{fn.__qualname__} is not a module-level function; ranks cannot find it")
    file = inspect.getsourcefile(fn)
    if file is None:
        raise TypeError(f"{fn.__qualname__} has no source file; ranks cannot find it")
    return fn.__module__, str(Path(file).resolve()), fn.__qualname__


class _Watch:
    """The parent's view of one call: which ranks run, which ended and how."""

    def __init__(self, directory: Path, world_size: int, timeout: float, stop: bool) -> None:
        self.directory = directory
        self.world_size = world_size
        self.stop_on_failure = stop
        self.start = time.monotonic()
        self.deadline = self.start + timeout
        self.running: dict[int, int] = {}  # pid -> rank
        self.codes: dict[int, tuple[int, float]] = {}  # rank -> exit status, when
        self.timed_out: set[int] = set()
        self.stopped: set[int] = set()

    def run(self, forks: ForkServer) -> list[Outcome]:
        for rank in range(self.world_size):
            self.running[forks.start(self.directory, rank)] = rank
        try:
            self._wait(forks)
        finally:
            self._end(forks)
        return [self._outcome(rank) for rank in range(self.world_size)]

    def _wait(self, forks: ForkServer) -> None:
        deadline = self.deadline
        while self.running and (event := self._next(forks, deadline)) is not None:
            failed = self._ended(event)
            if failed and self.stop_on_failure:
                deadline = min(deadline, time.monotonic() + SETTLE_S)
        hung = set(self.running.values())
        if deadline < self.deadline:
            self.stopped |= hung
            return
        self.timed_out |= hung
        for pid in self.running:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGUSR1)
        if hung:
            time.sleep(STACK_S)

    def _next(self, forks: ForkServer, deadline: float) -> dict | None:
        event = forks.event(deadline)
        if event is None and not forks.alive:
            raise RuntimeError("the fork server died")
        return event

    def _ended(self, event: dict) -> bool:
        rank = self.running.pop(event["exited"], None)
        if rank is None:
            return False
        self.codes[rank] = (event["code"], event["at"])
        if event["code"] != 0:
            (self.directory / f"dead-{rank}").touch()
        return event["code"] != 0

    def _end(self, forks: ForkServer) -> None:
        (self.directory / "abandoned").touch()
        for pid in self.running:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        while self.running and (event := forks.event(time.monotonic() + 10)) is not None:
            self._ended(event)

    def _outcome(self, rank: int) -> Outcome:
        output = self._text(f"output-{rank}")
        result = self.directory / f"result-{rank}"
        code, ended = self.codes.get(rank, (-signal.SIGKILL, time.monotonic()))
        at = ended - self.start
        if result.exists():
            return Outcome(rank, "ok", pickle.loads(result.read_bytes()), output=output, at=at)
        left = self.directory / f"failure-{rank}"
        if left.exists():
            failure: Failure = pickle.loads(left.read_bytes())
            at = failure.at - self.start
            return Outcome(rank, "error", None, failure.error, failure.traceback, output, at)
        stacks = self._text(f"stacks-{rank}")
        if rank in self.timed_out:
            limit = self.deadline - self.start
            error = f"still running after {limit:g} s"
            return Outcome(rank, "timeout", None, error, stacks, output, at)
        if rank in self.stopped:
            return Outcome(rank, "stopped", None, "ended because another failed", "", output, at)
        error = f"ended without an outcome, exit status {code}{_signal_name(code)}"
        return Outcome(rank, "killed", None, error, stacks, output, at)

    def _text(self, name: str) -> str:
        path = self.directory / name
        return path.read_text(errors="replace") if path.exists() else ""


def _signal_name(code: int) -> str:
    return f" ({signal.Signals(-code).name})" if code < 0 else ""
