"""A plan as data: saved, compared, reported, drawn; and solved again for another device."""

import json
import sys

import pytest

from ms_memory import MemoryFeatureError
from ms_memory.planner import Layer, LayerOption, Plan, Problem, chain, report, solve

MIB = 1 << 20
MS = 1_000_000

GOLDEN = """\
  peak      30.00 MiB at backward layers.3; unplanned 46.00 MiB at backward layers.3
  budget    32.00 MiB; the smallest with a plan is 22.00 MiB
  added     4.000 ms; no plan adds less than 4.000 ms
  host      0 B

site                      action         freed     ms  why
layers.0                  keep             0 B  0.000  nothing is faster here
layers.1 .. layers.2 (2)  recompute  16.00 MiB  4.000  4.0 MiB a ms
layers.3                  keep             0 B  0.000  nothing is faster here

-2.00 MiB: costs 0.000 ms
+2.00 MiB: saves 0.000 ms

least time added by budget:
     22.00 MiB  6.000 ms
     25.43 MiB  6.000 ms
     28.86 MiB  6.000 ms
     32.29 MiB  4.000 ms
     35.71 MiB  4.000 ms
     39.14 MiB  2.000 ms
     42.57 MiB  2.000 ms
     46.00 MiB  0.000 ms
"""


def layers(transfer=0):
    """Four layers; the copies of a swap stall by `transfer`."""
    options = (
        LayerOption("keep", 10 * MIB, 10 * MIB, 12 * MIB),
        LayerOption("recompute", 2 * MIB, 10 * MIB, 13 * MIB, time=2 * MS),
        LayerOption("swap", 0, 10 * MIB, 12 * MIB, 8 * MIB, time=transfer, host=10 * MIB),
    )
    return [Layer(f"layers.{i}", options) for i in range(4)]


def planned(**more):
    return solve(chain(layers(), base=4 * MIB), 32 * MIB, actions=("keep", "recompute"), **more)


def test_report_golden():
    lines = str(planned()).splitlines()
    assert lines[0] == f"memory plan {planned().digest[:12]}: proven fastest"
    assert "\n".join(lines[1:]) + "\n" == GOLDEN


def test_saved_and_read_again():
    plan = planned()
    data = json.loads(report.to_json(plan))
    assert Plan.from_dict(data) == plan
    assert data["digest"] == plan.digest
    problem = chain(layers(), base=3)
    assert Problem.from_dict(json.loads(json.dumps(problem.as_dict()))) == problem


def test_plan_hash_ranks():
    plan, other = planned(), planned(pins={"layers.1": "keep"})
    assert plan.digest == planned().digest
    assert plan.digest != other.digest
    plan.check_agreement({0: plan.digest, 1: planned().digest})
    with pytest.raises(MemoryFeatureError, match=r"E-M31.*ranks \[1\]"):
        plan.check_agreement({0: plan.digest, 1: other.digest})
    data = plan.as_dict()
    data["decisions"][0]["option"]["name"] = "recompute"
    with pytest.raises(MemoryFeatureError, match="E-M31"):
        Plan.from_dict(data)


def test_another_device_another_plan():
    """A slow link makes recomputation the better buy; the two plans are compared by site."""
    fast = solve(chain(layers(transfer=MS), 4 * MIB), 32 * MIB)
    slow = solve(chain(layers(transfer=9 * MS), 4 * MIB), 32 * MIB)
    assert {d.option.name for d in fast.decisions} == {"keep", "swap"}
    assert {d.option.name for d in slow.decisions} == {"keep", "recompute"}
    text = report.compare(fast, slow)
    assert "swap -> recompute" in text
    assert text.startswith("time added 2.000 -> 4.000 ms")


def test_picture(tmp_path):
    pytest.importorskip("matplotlib")
    found = report.picture(planned(explain=False), tmp_path / "memory.png")
    assert found.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match=r"\.png or \.svg"):
        report.picture(planned(explain=False), tmp_path / "memory.txt")


def test_picture_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    with pytest.raises(ImportError, match=r"ms-memory\[report\]"):
        report.picture(planned(explain=False), tmp_path / "memory.png")
