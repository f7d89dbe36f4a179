"""What torch_npu's profiler looks like: read from the library, and a stand-in built from a record.

A record holds names only: parameters of the functions that we call, members of what they take.
"""

from __future__ import annotations

import inspect
import json
from enum import Enum
from pathlib import Path
from types import ModuleType
from typing import Any

RECORD = Path(__file__).with_name("npu_profiler.json")
_CALLABLES = ("profile", "schedule", "tensorboard_trace_handler", "_ExperimentalConfig")
_METHODS = ("start", "step", "stop", "add_metadata_json")
_MEMBERS = ("ProfilerActivity", "ProfilerAction", "ProfilerLevel", "AiCMetrics")


def read(library: Any) -> dict[str, Any]:
    """The record of an importable `torch_npu.profiler`."""
    callables = {name: _parameters(getattr(library, name)) for name in _CALLABLES}
    methods = {f"profile.{name}": _parameters(getattr(library.profile, name)) for name in _METHODS}
    return {
        "parameters": {**callables, **methods},
        "members": {name: _members(getattr(library, name)) for name in _MEMBERS},
    }


def recorded() -> dict[str, Any]:
    """The record that is checked in, with the version it was made from."""
    return json.loads(RECORD.read_text(encoding="utf-8"))


def _parameters(function: Any) -> list[str]:
    parameters = list(inspect.signature(function).parameters.values())
    # One that needs no value is marked, so that a new demand is a difference.
    return [
        p.name + ("" if p.default is inspect.Parameter.empty else "=")
        for p in parameters
        if p.name != "self"
    ]


def _members(place: Any) -> list[str]:
    named = place.__members__ if hasattr(place, "__members__") else vars(place)
    return sorted(name for name in named if not name.startswith("_"))


class Call:
    """A call that was made, checked against the recorded parameters."""

    def __init__(self, name: str, arguments: dict[str, Any]) -> None:
        record = recorded()["parameters"][name]
        known = {parameter.rstrip("=") for parameter in record}
        unknown = set(arguments) - known
        assert not unknown, f"{name} has no parameter {sorted(unknown)}"
        missing = {p for p in record if not p.endswith("=")} - set(arguments)
        assert not missing, f"{name} needs {sorted(missing)}"
        self.name, self.arguments = name, arguments


class FakeProfile:
    """torch_npu's profile without a device: keeps calls, and saves as the schedule says."""

    made: list[FakeProfile] = []  # noqa: RUF012

    def __init__(self, **arguments: Any) -> None:
        self.call = Call("profile", arguments)
        self.plan: list[str] = arguments["schedule"]
        self.steps: list[str] = []
        self.ended_early = False
        self.metadata: dict[str, Any] = {}
        FakeProfile.made.append(self)

    def _action(self) -> str:
        return self.plan[len(self.steps) - 1] if 0 < len(self.steps) <= len(self.plan) else "NONE"

    def start(self) -> None:
        self.steps.append("step")

    def step(self) -> None:
        before = self._action()
        self.steps.append("step")
        if before == "RECORD_AND_SAVE":
            self._save()

    def stop(self) -> None:
        if self._action().startswith("RECORD"):
            self.ended_early = True
            self._save()
        self.steps += ["stop"] * len(self.plan)

    def add_metadata_json(self, key: str, value: str) -> None:
        self.metadata[key] = json.loads(value)

    def _save(self) -> None:
        self.call.arguments["on_trace_ready"](self)


def fake() -> dict[str, ModuleType]:
    """Modules `torch_npu` and `torch_npu.profiler` for `sys.modules`, with recorded names only."""
    library = ModuleType("torch_npu.profiler")
    FakeProfile.made = []
    for name, members in recorded()["members"].items():
        setattr(library, name, Enum(name, members))

    def schedule(**arguments: Any) -> list[str]:
        given = Call("schedule", arguments).arguments
        assert given["wait"] == 0
        assert given["repeat"] == 1
        records = ["RECORD"] * (given["active"] - 1) + ["RECORD_AND_SAVE"]
        return ["WARMUP"] * given["warmup"] + records

    def handler(**arguments: Any) -> Any:
        given = Call("tensorboard_trace_handler", arguments).arguments
        folder = Path(given["dir_name"]) / f"{given['worker_name']}_7_20260101_ascend_pt"
        return lambda profile: folder.mkdir()

    library.profile = FakeProfile
    library.schedule = schedule
    library.tensorboard_trace_handler = handler
    library._ExperimentalConfig = lambda **arguments: Call("_ExperimentalConfig", arguments)
    package = ModuleType("torch_npu")
    package.profiler = library
    return {"torch_npu": package, "torch_npu.profiler": library}
