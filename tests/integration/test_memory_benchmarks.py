"""The memory benchmarks at tiny sizes: their own checks hold, and the page shows their results."""

import importlib
import json
import sys
import time

import pytest
import torch
from torch.utils.flop_counter import flop_registry

from .workspace import ROOT

FOLDER = ROOT / "benchmarks" / "memory"
NAMES = ("budgets", "features", "gpt", "meter", "packed_adamw", "peers", "swaps", "table")


@pytest.fixture(scope="module")
def drivers():
    """Modules of the folder, by name; they import each other by these names."""
    taken = {name: sys.modules.pop(name) for name in NAMES if name in sys.modules}
    threads = torch.get_num_threads()
    sys.path.insert(0, str(FOLDER))
    try:
        found = {name: importlib.import_module(name) for name in NAMES}
        formulas = dict(flop_registry)
        found["meter"].register_attention()
        yield found
        flop_registry.clear()
        flop_registry.update(formulas)
    finally:
        sys.path.remove(str(FOLDER))
        torch.set_num_threads(threads)
        for name in NAMES:
            sys.modules.pop(name, None)
        sys.modules.update(taken)


def small(drivers, layers):
    return drivers["gpt"].Size(layers, 16, 2, 16, 8, 1)


def test_features_are_as_their_formulas(drivers):
    module, size = drivers["features"], small(drivers, 3)
    for part in (module.activations, module.elsewhere, module.optimizers):
        for row in part(size):
            assert row.as_dict()["bytes"] == row.expected > 0
    with pytest.raises(AssertionError):
        module.Row("a feature", "a formula", 8, 9).as_dict()


def test_budgets(drivers, monkeypatch):
    """Every contender that has a setting is within the budget; the best never adds most FLOPs."""
    module = drivers["budgets"]
    for name, value in {"SHARES": (0.5,), "FRACTIONS": (), "SOLVERS": ("dp",)}.items():
        monkeypatch.setattr(module, name, value)
    bench = module.Bench(small(drivers, 2), "eager")
    rows = module.at_budgets(bench, time.process_time_ns)
    found = module.result(bench, rows, *module.timed(bench, rows, 1))
    contenders = found["budgets"][0]["contenders"]
    entries = [e for e in contenders.values() if e is not None]
    planned = contenders["planner"], contenders["planner, times counted"]
    assert all(p in entries for p in planned)
    assert all(0 < e["bytes"] <= found["budgets"][0]["bytes"] for e in entries)
    # Compiled graphs are measured too: without a budget they save about as much as eager layers.
    assert 0.8 < found["unplanned"]["compiled_bytes"] / found["unplanned"]["bytes"] < 1.5
    full = contenders["Megatron full, uniform"]["flops_added"]
    assert 0 < planned[1]["flops_added"] < full
    assert contenders["torch.compile, dp"]["flops_added"] > 0
    environment = drivers["meter"].environment()
    text = drivers["table"].budgets({"environment": environment, "rounds": 1, **found})
    assert f"{contenders['planner']['time']:.2f} (" in text

    def scaled(model):
        return drivers["peers"].forwards([model.norm], lambda plain: lambda x: plain(x) * 1.01)

    with pytest.raises(AssertionError, match="other gradients"):
        bench.check(module.Setting("wrong", scaled))


def test_virtual_time(drivers, monkeypatch):
    """Recomputation takes what was predicted, swaps at most that; peaks are as predicted."""
    module = drivers["swaps"]
    monkeypatch.setattr(module, "SHARES", (0.3,))
    (row,) = module.measure(small(drivers, 3))["budgets"]
    alone, swaps = row["recompute only"], row["with swaps"]
    assert alone["added_ns"] == alone["predicted_ns"] > swaps["predicted_ns"] >= swaps["added_ns"]
    for found in (alone, swaps):
        assert found["peak"] == found["predicted_peak"] <= row["bytes"]
    assert swaps["host"] > alone["host"] == 0


def test_packed_adamw(drivers):
    found = drivers["packed_adamw"].measure((64,), None, 1)
    assert found["bytes_a_parameter_beside_weights"]["master"] == 12


def test_the_page_shows_the_results(drivers):
    page = drivers["table"].PAGE.read_text(encoding="utf-8")
    assert drivers["table"].filled(page) == page
    for name in ("budgets", "swaps", "features"):
        assert json.loads((FOLDER / "results" / f"{name}.json").read_text())["environment"]
