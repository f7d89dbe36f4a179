"""Which backend serves a call: context > `set_backend` > environment MS_OPS > priority.

A backend of a family is one module beside the family's API (`ms_ops/norm/npu.py`) that holds
`BACKEND = Backend(...)`. Adding the file is all it takes: the stems below are looked for when the
first call of the family is made, and imported at first use. Other distributions add backends
through the entry point group `ms_ops.backends` or `register_backend`.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import logging
import os
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch

STEMS = ("npu", "triton", "portable", "compiled", "reference")
ENVIRONMENT = "MS_OPS"
ENTRY_POINTS = "ms_ops.backends"

_log = logging.getLogger("ms_ops")


class Facts(NamedTuple):
    """What a backend may know of a call before it runs: never a value, never a symbolic size."""

    device: str
    dtype: torch.dtype
    options: tuple[tuple[str, object], ...] = ()

    def option(self, name: str) -> object:
        """Return one option of the call, None when the operator does not have it."""
        return dict(self.options).get(name)


def always(facts: Facts) -> str | None:
    """Verdict of a kernel without limits."""
    return None


@dataclass(frozen=True)
class Kernel:
    """Forward and backward of one operator in one backend; None where there is no derivative.

    `supports(facts)` returns None when the kernel can serve the call, else the reason.
    `deterministic` says that two runs of a call give the same bits, or that torch's own operators
    see to it: under `torch.use_deterministic_algorithms(True)` other kernels are not chosen, with
    `warn_only` they are, with a warning.
    """

    forward: Callable[..., Any]
    backward: Callable[..., Any] | None = None
    supports: Callable[[Facts], str | None] = always
    deterministic: bool = True


@dataclass(frozen=True)
class Backend:
    """A set of kernels that stand or fall with one dependency.

    `available()` returns None when the dependency is there, else the reason; the lower the
    priority number, the earlier the backend is asked.
    """

    name: str
    priority: int
    kernels: Mapping[str, Kernel]
    available: Callable[[], str | None] = lambda: None


class Verdict(NamedTuple):
    """One backend's answer to a call; `reason` is None when it can serve."""

    backend: str
    priority: int
    reason: str | None


class BackendError(RuntimeError):
    """A backend was asked for by name and cannot serve, or none can."""


_families: dict[str, str] = {}
_extra: dict[str, dict[str, Backend]] = {}
_loaded: dict[str, dict[str, Backend]] = {}
_set: dict[str, str] = {}
_choices: dict[tuple[str, Facts, Any], str] = {}
_local = threading.local()


def register_operator(op: str, family: str) -> None:
    """Tell the registry which package folder holds the backends of `op`."""
    _families[op] = family


def register_backend(op: str, backend: Backend) -> None:
    """Add a backend to an operator; one of the same name is replaced.

    Raises:
        ValueError: unknown operator, or the backend has no kernel for it.
    """
    _known(op)
    if op not in backend.kernels:
        raise ValueError(f"register_backend: backend {backend.name!r} has no kernel for {op!r}")
    _extra.setdefault(op, {})[backend.name] = backend
    _forget(op)


def unregister_backend(op: str, name: str) -> None:
    """Remove a backend that `register_backend` added."""
    _extra.get(op, {}).pop(name, None)
    _forget(op)


def operators() -> tuple[str, ...]:
    """Return the names of all operators."""
    return tuple(sorted(_families))


def backends(op: str) -> dict[str, Backend]:
    """Return the backends of an operator by name, in the order in which they are asked."""
    if op not in _loaded:
        found = {b.name: b for b in _modules(_known(op)) if op in b.kernels}
        found |= {b.name: b for b in _entry_points() if op in b.kernels}
        found |= _extra.get(op, {})
        _loaded[op] = dict(sorted(found.items(), key=lambda item: item[1].priority))
    return _loaded[op]


def kernel(op: str, name: str) -> Kernel:
    """Return the kernel of an operator in a backend that `choose` has named."""
    return backends(op)[name].kernels[op]


def choose(op: str, facts: Facts) -> str:
    """Return the name of the backend that serves a call.

    Raises:
        BackendError: the backend that was asked for cannot serve, with its reason.
    """
    request = (*_request(op), _exact())
    key = (op, facts, request)
    name = _choices.get(key)
    if name is None:
        name = _choices[key] = _decide(op, facts, *request[:2])
    if request[2] == "warn" and not kernel(op, name).deterministic:
        # Worded as torch does, so that who collects torch's warnings sees it.
        what = f"ms::{op}[{name}] does not have a deterministic implementation"
        warnings.warn(f"{what}, two runs may differ", stacklevel=2)
    return name


def verdicts(op: str, facts: Facts) -> list[Verdict]:
    """Ask every backend of an operator about a call."""
    return [_verdict(op, b, facts) for b in backends(op).values()]


@contextmanager
def backend(everything: str | None = None, /, **chosen: str) -> Iterator[None]:
    """Force backends within a block of this thread: `backend("reference")`, `backend(rope="npu")`.

    Under torch.compile the choice made while tracing stays with the compiled code.
    """
    chosen = ({"*": everything} if everything else {}) | chosen
    for op in chosen.keys() - {"*"}:
        _known(op)
    stack = _stack()
    stack.append({**(stack[-1] if stack else {}), **chosen})
    try:
        yield
    finally:
        stack.pop()


def set_backend(op: str, name: str | None) -> None:
    """Force a backend for one operator ("*": for all) in this process; None takes it back."""
    if op != "*":
        _known(op)
    if name is None:
        _set.pop(op, None)
    else:
        _set[op] = name


def report() -> list[tuple[str, Facts, str]]:
    """List the distinct choices made so far as (operator, facts, backend)."""
    return sorted(
        {(op, facts, name) for (op, facts, _), name in _choices.items()},
        key=lambda row: (row[0], row[2], str(row[1])),
    )


def _known(op: str) -> str:
    if op not in _families:
        raise ValueError(f"operator: got {op!r}, need one of {', '.join(operators())}")
    return _families[op]


def _forget(op: str) -> None:
    _loaded.pop(op, None)
    for key in [k for k in _choices if k[0] == op]:
        del _choices[key]


def _modules(family: str) -> Iterator[Backend]:
    for stem in STEMS:
        if importlib.util.find_spec(f"{family}.{stem}") is not None:
            yield importlib.import_module(f"{family}.{stem}").BACKEND


@cache
def _entry_points() -> tuple[Backend, ...]:
    return tuple(e.load() for e in importlib.metadata.entry_points(group=ENTRY_POINTS))


def _stack() -> list[dict[str, str]]:
    if not hasattr(_local, "stack"):
        _local.stack = []
    return _local.stack  # type: ignore[no-any-return]


@lru_cache(maxsize=32)
def _parse(text: str) -> tuple[dict[str, str], frozenset[str]]:
    """Read `rms_norm:portable,*:npu,!triton` into forced names and refused backends."""
    forced: dict[str, str] = {}
    refused = set()
    for item in filter(None, (part.strip() for part in text.split(","))):
        op, colon, name = item.partition(":")
        if item.startswith("!"):
            refused.add(item[1:])
        elif colon and name and (op == "*" or op in _families):
            forced[op] = name
        else:
            raise ValueError(
                f"{ENVIRONMENT}: got {item!r}, need operator:backend, *:backend or !backend; "
                f"operators are {', '.join(operators())}"
            )
    return forced, frozenset(refused)


def _request(op: str) -> tuple[str | None, frozenset[str]]:
    environment, refused = _parse(os.environ.get(ENVIRONMENT, ""))
    stack = _stack()
    for source in (stack[-1] if stack else {}, _set, environment):
        name = source.get(op) or source.get("*")
        if name:
            return name, refused
    return None, refused


def _exact() -> str:
    """Return what torch is told of algorithms whose results vary: "", "warn" or "error"."""
    if not torch.are_deterministic_algorithms_enabled():
        return ""
    return "warn" if torch.is_deterministic_algorithms_warn_only_enabled() else "error"


def _verdict(op: str, candidate: Backend, facts: Facts) -> Verdict:
    found = candidate.kernels[op]
    reason = candidate.available() or found.supports(facts)
    if reason is None and not found.deterministic and _exact() == "error":
        reason = "two runs may differ, and torch.use_deterministic_algorithms is on"
    return Verdict(candidate.name, candidate.priority, reason)


def _decide(op: str, facts: Facts, forced: str | None, refused: frozenset[str]) -> str:
    if forced is not None:
        return _forced(op, facts, forced)
    answers = [v for v in verdicts(op, facts) if v.backend not in refused]
    for answer in answers:
        if answer.reason is None:
            _log.info("%s: backend %s for %s", op, answer.backend, facts)
            return answer.backend
        _log.info("%s: backend %s declines: %s", op, answer.backend, answer.reason)
    tried = "; ".join(f"{v.backend}: {v.reason}" for v in answers) or "all are refused"
    raise BackendError(f"{op}: backend: got none that can serve {facts}, need one ({tried})")


def _forced(op: str, facts: Facts, name: str) -> str:
    candidate = backends(op).get(name)
    if candidate is None:
        known = ", ".join(backends(op))
        raise BackendError(f"{op}: backend: got {name!r}, need one of {known}")
    reason = _verdict(op, candidate, facts).reason
    if reason is not None:
        raise BackendError(f"{op}: backend: got {name!r}, need another: {reason}")
    return name
