"""What a forked rank does: load the function, join the group, run, leave the outcome in files."""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import importlib.util
import os
import pickle
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

LAST_RESORT_S = 30.0


@dataclass(frozen=True)
class Call:
    """One call of `run_ranks`, as the children read it; `arguments` is pickled on its own.

    The arguments may hold objects of the test's module, which is known only once it is loaded.
    """

    module: str
    file: str
    qualname: str
    arguments: bytes
    world_size: int
    backend: str | None
    timeout: float
    path: tuple[str, ...]
    environ: dict[str, str]
    cwd: str
    kill_at: tuple[int, int] | None
    mutations: tuple[Any, ...]


@dataclass(frozen=True)
class Failure:
    """What a rank leaves when it raises: when (monotonic seconds), what, and where."""

    at: float
    error: str
    traceback: str


_kill_step: int | None = None


def fault_point(step: int) -> None:
    """Die by SIGKILL here if the test asked for this rank and this step with `kill_at`."""
    if step == _kill_step:
        os.kill(os.getpid(), signal.SIGKILL)


def run_rank(directory: Path, rank: int) -> int:
    """Run the call stored in `directory` as `rank`; returns the exit status."""
    log = _open(directory / f"output-{rank}")
    os.dup2(log, 1)
    os.dup2(log, 2)
    stacks = _open(directory / f"stacks-{rank}")
    faulthandler.enable(file=stacks)
    faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=True)
    try:
        call = pickle.loads((directory / "call").read_bytes())
        # If the test process and the server are both killed, a hung rank still ends.
        faulthandler.dump_traceback_later(call.timeout + LAST_RESORT_S, exit=True, file=stacks)
        result = pickle.dumps(_run(call, directory, rank))
    except BaseException as error:
        text = "".join(traceback.format_exception(error))
        summary = "".join(traceback.format_exception_only(error)).strip()
        _write(
            directory / f"failure-{rank}", pickle.dumps(Failure(time.monotonic(), summary, text))
        )
        return 1
    _write(directory / f"result-{rank}", result)
    _leave_together(directory, rank, call.world_size, call.timeout)
    return 0


def _run(call: Call, directory: Path, rank: int) -> Any:
    global _kill_step
    sys.path[:] = call.path
    os.environ.clear()
    os.environ.update(call.environ)
    os.chdir(call.cwd)
    if call.kill_at is not None and call.kill_at[0] == rank:
        _kill_step = call.kill_at[1]
    function = _function(call)
    arguments = pickle.loads(call.arguments)
    _seed()
    if call.backend is not None:
        _join(call, directory, rank)
    with ExitStack() as stack:
        for mutation in call.mutations:
            stack.enter_context(mutation.applied())
        return function(rank, call.world_size, *arguments)


def _function(call: Call) -> Callable[..., Any]:
    found: Any = _module(call.module, call.file)
    for part in call.qualname.split("."):
        found = getattr(found, part)
    return found


def _module(name: str, file: str) -> ModuleType:
    """The module `name` of `file`, under the name that the test process gave it.

    pytest's importlib mode names a test file by its path below the root (tests.ops.test_norm),
    and the root need not be on sys.path there; here it is added, so that the file and its
    relative imports resolve as an ordinary (namespace) package.
    """
    root = Path(file).with_suffix("")
    for part in reversed(name.split(".")):
        if root.name != part:
            return _module_by_file(name, file)
        root = root.parent
    if name not in sys.modules and str(root) not in sys.path:
        sys.path.insert(0, str(root))
    module = importlib.import_module(name)
    if Path(module.__file__ or "").resolve() != Path(file).resolve():
        return _module_by_file(name, file)
    return module


def _module_by_file(name: str, file: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ImportError(f"cannot load {name} from {file}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _seed() -> None:
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)


def _join(call: Call, directory: Path, rank: int) -> None:
    import torch.distributed as dist

    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(call.world_size),
        LOCAL_WORLD_SIZE=str(call.world_size),
    )
    dist.init_process_group(
        call.backend,
        init_method=f"file://{directory}/store",
        rank=rank,
        world_size=call.world_size,
        timeout=timedelta(seconds=call.timeout),
    )


def _leave_together(directory: Path, rank: int, world_size: int, timeout: float) -> None:
    """Stay until every rank has an outcome: a peer may still read from our sockets.

    Plain files, so that it works with any group, also a broken or destroyed one.
    """
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline and not (directory / "abandoned").exists():
        if all(_has_outcome(directory, peer) for peer in range(world_size)):
            return
        time.sleep(0.005)


def _has_outcome(directory: Path, rank: int) -> bool:
    return any((directory / f"{kind}-{rank}").exists() for kind in OUTCOME_FILES)


OUTCOME_FILES: Sequence[str] = ("result", "failure", "dead")


def _open(path: Path) -> int:
    """A descriptor to write `path` with; it stays open as long as the rank lives."""
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)


def _write(path: Path, data: bytes) -> None:
    partial = path.with_suffix(".partial")
    partial.write_bytes(data)
    with contextlib.suppress(FileNotFoundError):  # the test process may have given up meanwhile
        partial.rename(path)
