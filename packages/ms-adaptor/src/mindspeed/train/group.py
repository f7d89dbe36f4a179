"""The processes of one level: start, command, listen, and tell which rank failed and why."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import tempfile
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from mindspeed.train.config import TrainConfig
from mindspeed.train.messages import receive, send
from mindspeed.train.preload import PRELOAD_VARIABLE
from mindspeed.train.worker import RankJob, rank_main

# Peers notice a killed rank at once, and may say so before the kernel reports its end.
_SETTLE_S = 1.0
_PEER_WORDS = (
    "connection closed by peer",
    "connection reset by peer",
    "socket closed",
    "broken pipe",
    "timed out",
    "timeout",
    "gloo",
)


class RankFailure(RuntimeError):
    """A rank ended before its job did; the message names it and says why.

    Attributes:
        trace: the traceback of the rank that failed first, if it has one.
    """

    def __init__(self, text: str, trace: str = "") -> None:
        super().__init__(text)
        self.trace = trace


class Group:
    """The ranks that train with one level.

    Args:
        config: the configuration, level included.
        nproc: number of ranks.
        cache: folder of the indexed datasets.
        load: checkpoint to start from.
        reshard: it may be cut anew.
    """

    def __init__(
        self,
        config: TrainConfig,
        nproc: int,
        cache: Path,
        load: Path | None = None,
        reshard: bool = False,
    ) -> None:
        self.config = config
        self.nproc = nproc
        self.level = config.optimization_level
        self.step = 0
        self._rendezvous = tempfile.TemporaryDirectory(prefix="mindspeed-")
        self._processes: list[Any] = []
        self._connections: list[Connection] = []
        try:
            self._start(cache, load, reshard)
        except BaseException:
            self.kill()
            raise

    def _start(self, cache: Path, load: Path | None, reshard: bool) -> None:
        config, nproc = self.config, self.nproc
        threads = max(1, usable_cores() // nproc)
        context = _context()
        for rank in range(nproc):
            mine, theirs = context.Pipe()
            job = RankJob(
                flat=config.flat(),
                rank=rank,
                world_size=nproc,
                store=f"{self._rendezvous.name}/store",
                cache=str(cache),
                threads=threads,
                load=None if load is None else str(load),
                reshard=reshard,
            )
            process = context.Process(target=rank_main, args=(job, theirs))
            process.start()
            theirs.close()
            self._processes.append(process)
            self._connections.append(mine)

    def command(self, kind: str, **content: Any) -> None:
        """Sends one command to every rank."""
        for rank, connection in enumerate(self._connections):
            try:
                send(connection, kind, **content)
            except OSError:
                raise self._failure(rank) from None

    def events(self, until: str) -> Iterator[dict[str, Any]]:
        """Messages of the ranks, until each has sent one of kind `until`.

        Raises:
            RankFailure: a rank reported an error or died.
        """
        waiting = set(range(self.nproc))
        while waiting:
            for rank in self._readable(waiting):
                try:
                    message = receive(self._connections[rank])
                except (EOFError, OSError):
                    raise self._failure(rank) from None
                if message["kind"] == "error":
                    raise self._failure(rank, message)
                if message["kind"] == until:
                    waiting.discard(rank)
                if message["kind"] in ("step", "ready"):
                    self.step = message["step"]
                yield message

    def _readable(self, ranks: set[int]) -> list[int]:
        """Ranks that have sent something; raises if one of the others has died."""
        pipes = {self._connections[rank]: rank for rank in ranks}
        # A rank's own children may keep its pipe open, so its end is watched as well.
        ends = {process.sentinel: rank for rank, process in enumerate(self._processes)}
        ready = wait([*pipes, *ends])
        sent = [pipes[handle] for handle in ready if handle in pipes]
        dead = [ends[handle] for handle in ready if handle in ends]
        for rank in dead:
            if rank not in sent and self._processes[rank].exitcode != 0:
                raise self._failure(rank)
        return sent

    def _failure(self, rank: int, message: dict[str, Any] | None = None) -> RankFailure:
        """Collects what every rank has to say, ends them all, and picks the first cause."""
        reports = {} if message is None else {rank: message}
        deadline = time.monotonic() + _SETTLE_S
        while time.monotonic() < deadline and len(reports) < self.nproc:
            self._collect(reports, deadline)
        codes = {
            each: process.exitcode
            for each, process in enumerate(self._processes)
            if process.exitcode is not None and each not in reports
        }
        self.kill()
        return _explain(self.nproc, self.level, self.step, reports, codes)

    def _collect(self, reports: dict[int, dict[str, Any]], deadline: float) -> None:
        open_ones = {c: r for r, c in enumerate(self._connections) if not c.closed}
        ready = wait(list(open_ones), timeout=max(0.0, deadline - time.monotonic()))
        for connection in ready:
            assert isinstance(connection, Connection)
            try:
                message = receive(connection)
            except (EOFError, OSError):
                connection.close()
                continue
            if message["kind"] == "error":
                reports[open_ones[connection]] = message
        if not open_ones:
            time.sleep(max(0.0, deadline - time.monotonic()))

    def close(self) -> None:
        """Ends the ranks in good order."""
        self.command("finish")
        for _ in self.events("done"):
            pass
        for process in self._processes:
            process.join(timeout=10)
        self.kill()

    def kill(self) -> None:
        """Ends whatever is left, at once; does nothing the second time."""
        for process in self._processes:
            # Each rank leads a process group of its own: this also ends a writer of checkpoints.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            if process.is_alive():
                process.kill()
        for process in self._processes:
            process.join(timeout=5)
        for connection in self._connections:
            connection.close()
        self._rendezvous.cleanup()


def _context() -> Any:
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mindspeed.train.preload"])
    from multiprocessing import forkserver

    before = os.environ.get(PRELOAD_VARIABLE)
    os.environ[PRELOAD_VARIABLE] = "1"
    # The fork server ignores interrupts by itself, but not termination of the terminal's group.
    forkserver.ensure_running()
    if before is None:
        del os.environ[PRELOAD_VARIABLE]
    return context


def _explain(
    nproc: int,
    level: int,
    step: int,
    reports: dict[int, dict[str, Any]],
    codes: dict[int, int],
) -> RankFailure:
    where = f"of {nproc} (level {level}) at step {step + 1}"
    killed = {rank: code for rank, code in codes.items() if code < 0}
    if killed:
        rank, code = next(iter(killed.items()))
        name = signal.Signals(-code).name
        return RankFailure(f"rank {rank} {where} was killed by signal {-code} ({name})")
    own = [r for r in sorted(reports) if not _blames_a_peer(reports[r]["text"])]
    if own:
        report = reports[own[0]]
        if report["known"]:
            return RankFailure(report["text"].partition(": ")[2])
        return RankFailure(f"rank {own[0]} {where} failed: {report['text']}", report["trace"])
    silent = [rank for rank in range(nproc) if rank not in reports and rank not in codes]
    if reports and silent:
        names = ", ".join(map(str, silent))
        return RankFailure(f"rank {names} {where} did not answer in time and was stopped")
    if reports:
        first = min(reports)
        report = reports[first]
        return RankFailure(f"rank {first} {where} failed: {report['text']}", report["trace"])
    rank, code = next(iter(codes.items()), (0, 0))
    return RankFailure(f"rank {rank} {where} ended with status {code} and no message")


def _blames_a_peer(text: str) -> bool:
    low = text.lower()
    return any(word in low for word in _PEER_WORDS)


def usable_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
