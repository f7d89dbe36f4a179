"""Stand-ins for the handles of communications under way.

What torch's dispatcher returns for a collective holds a `torch.distributed.Work`. A `WorkProxy` may
be returned in its place: it forwards everything to the original, and a subclass hears the waits. It
is a Work in its own right, so that torch's C++ code (data parallelism waits there) calls it too.

C++ may own such an object alone, and then calls into an empty shell: its Python half is gone and
`wait` never returns. So each proxy is held here until nothing can wait on it any more.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch.distributed import Work

from ms_profile.tap import Meter

__all__ = ["WorkProxy", "replaced"]


class WorkProxy(Work):
    """Forwards to the Work that it stands for."""

    def __init__(self, work: Work, maker: Meter) -> None:
        super().__init__()
        self._work = work
        self._asked = False  # for the outcome: the last thing that C++ does with a Work
        self._maker = maker
        _hold(self)

    def wait(self, *args: Any, **kwargs: Any) -> bool:
        """Blocks the caller, or its stream, until the communication is done."""
        try:
            return self._work.wait(*args, **kwargs)
        finally:
            self._asked = True

    def get_future(self) -> Any:
        """The future of the communication's tensors."""
        self._asked = True
        return self._work.get_future()

    def _is_needed(self) -> bool:
        return not self._asked and (self._maker.is_on or not self._work.is_completed())


def _forwarded(name: str) -> Callable[..., Any]:
    def call(self: WorkProxy, *args: Any, **kwargs: Any) -> Any:
        return getattr(self._work, name)(*args, **kwargs)

    call.__name__ = name
    return call


for _name in dir(Work):
    if not _name.startswith(("__", "_pybind11")) and _name not in (
        "boxed",
        "unbox",
        *vars(WorkProxy),
    ):
        setattr(WorkProxy, _name, _forwarded(_name))


_held: list[WorkProxy] = []
_lock = threading.RLock()


def _references(things: list[Any], index: int) -> int:
    return sys.getrefcount(things[index])


_ALONE = _references([object()], 0)  # held by one list and by nothing else


def _hold(proxy: WorkProxy) -> None:
    with _lock:
        release()
        _held.append(proxy)


def release() -> None:
    """Lets go of the proxies that only this module still holds and nothing can wait on."""
    with _lock:
        for index in reversed(range(len(_held))):
            if _references(_held, index) == _ALONE and not _held[index]._is_needed():
                del _held[index]


def replaced(out: Any, make: Callable[[Work], Work]) -> Any:
    """An operator's result with the Work in it, if there is one, replaced by `make(work)`."""
    if isinstance(out, torch.ScriptObject) and str(out._type()).endswith(".Work"):
        return make(Work.unbox(out)).boxed()
    if isinstance(out, tuple):
        return tuple(replaced(each, make) for each in out)
    return out
