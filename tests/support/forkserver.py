"""A process that has paid for the imports once and forks a fresh rank on request.

The server is started once per (test process, preload) and is single threaded, so forking it is
safe; `spawn` would import torch again in every rank (3 to 7 s a test instead of about 0.1 s).
The standard library's fork server is not used because a process can have only one of them, and
because it swallows errors of its preloads.

Requests and events are JSON lines over a socket pair. When the test process dies, the server
reads end-of-file, kills its ranks and exits: nothing is left behind.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import multiprocessing.util
import os
import select
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
START_TIMEOUT_S = 180.0
BOOT = (
    "import sys; sys.path.insert(0, sys.argv[1]); "
    "from support.forkserver import serve; serve(int(sys.argv[2]), sys.argv[3:])"
)


class ForkServer:
    """The test process's end of one server."""

    def __init__(self, preload: Sequence[str]) -> None:
        ours, theirs = socket.socketpair()
        environ = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        with theirs:
            self._server = subprocess.Popen(
                [sys.executable, "-c", BOOT, str(TESTS), str(theirs.fileno()), *preload],
                pass_fds=[theirs.fileno()],
                env=environ,
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # a Ctrl-C reaches the test process only
            )
        self._socket = ours
        self._buffer = b""
        self._queue: list[dict] = []
        atexit.register(self.close)
        ready = self.event(time.monotonic() + START_TIMEOUT_S)
        if ready is None or "ready" not in ready:
            self.close()
            reason = "no answer" if ready is None else ready.get("failed", str(ready))
            raise RuntimeError(f"fork server with preload {list(preload)} did not start: {reason}")

    @property
    def alive(self) -> bool:
        """Whether the server still runs."""
        return self._server.poll() is None

    def start(self, directory: Path, rank: int) -> int:
        """Fork one rank that runs the call stored in `directory`; returns its pid."""
        request = {"directory": str(directory), "rank": rank}
        self._socket.sendall(json.dumps(request).encode() + b"\n")
        skipped = []
        while (event := self.event(time.monotonic() + START_TIMEOUT_S)) is not None:
            if "pid" in event:
                self._queue.extend(skipped)
                return event["pid"]
            skipped.append(event)
        raise RuntimeError("fork server died or does not answer")

    def event(self, deadline: float) -> dict | None:
        """The next event, or None when `deadline` (monotonic seconds) passes or the server died."""
        if self._queue:
            return self._queue.pop(0)
        while b"\n" not in self._buffer:
            wait = max(0.0, deadline - time.monotonic())
            if not select.select([self._socket], [], [], wait)[0]:
                return None
            chunk = self._socket.recv(65536)
            if not chunk:
                return None
            self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\n")
        return json.loads(line)

    def close(self) -> None:
        """End the server and every rank that it still has."""
        atexit.unregister(self.close)
        self._socket.close()
        try:
            self._server.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._server.kill()
            self._server.wait()


_SERVERS: dict[tuple[str, ...], ForkServer] = {}


def server(preload: Sequence[str]) -> ForkServer:
    """The running server with these preloaded modules, started on first use."""
    key = tuple(preload)
    known = _SERVERS.get(key)
    if known is None or not known.alive:
        known = _SERVERS[key] = ForkServer(key)
    return known


def close_servers() -> None:
    """End every server of this process; the next use starts a new one."""
    while _SERVERS:
        _SERVERS.popitem()[1].close()


def serve(fd: int, preload: Sequence[str]) -> None:
    """Body of the server process: preload, then fork on request until end-of-file."""
    channel = socket.socket(fileno=fd)

    def tell(**event: object) -> None:
        # The test process may be gone already; end-of-file ends the loop below.
        with contextlib.suppress(OSError):
            channel.sendall(json.dumps(event).encode() + b"\n")

    try:
        for name in preload:
            importlib.import_module(name)
    except BaseException:
        tell(failed=traceback.format_exc())
        raise
    gc.freeze()  # a rank's collections neither walk nor copy what all ranks share
    tell(ready=True)
    wake_read, wake_write = os.pipe()
    os.set_blocking(wake_read, False)
    os.set_blocking(wake_write, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake_write)
    children: set[int] = set()
    buffer = b""
    while True:
        select.select([channel, wake_read], [], [])
        for pid, code in _reap(wake_read):
            children.discard(pid)
            _kill_group(pid)
            tell(exited=pid, code=code, at=time.monotonic())
        if not select.select([channel], [], [], 0)[0]:
            continue
        chunk = channel.recv(65536)
        if not chunk:
            break
        *lines, buffer = (buffer + chunk).split(b"\n")
        for line in lines:
            request = json.loads(line)
            pid = os.fork()
            _own_group(pid)
            if pid == 0:
                _become_rank(request, [channel.fileno(), wake_read, wake_write])
            children.add(pid)
            tell(pid=pid)
    for pid in children:
        _kill_group(pid)
    os._exit(0)


def _own_group(pid: int) -> None:
    """Make a rank (0: this process) lead a process group, set from both sides of the fork."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.setpgid(pid, pid)


def _kill_group(pid: int) -> None:
    """End a rank with everything that it started, such as Megatron's checkpoint writers."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def _reap(wake_read: int) -> Iterator[tuple[int, int]]:
    with contextlib.suppress(BlockingIOError):
        os.read(wake_read, 4096)
    with contextlib.suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            yield pid, os.waitstatus_to_exitcode(status)


def _become_rank(request: dict, inherited: Sequence[int]) -> None:
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for fd in inherited:
        os.close(fd)
    code = 1
    try:
        from support.rank_child import run_rank

        code = run_rank(Path(request["directory"]), request["rank"])
        multiprocessing.util._exit_function()  # ends the rank's own children, as an exit would
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # the server's exit handlers are not the rank's
