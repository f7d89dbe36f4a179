"""`mindspeed doctor`: each thing that can be wrong is found and has an advice."""

import os
from pathlib import Path

import pytest

from mindspeed import doctor
from mindspeed.patching.source import SourceTree

VERSIONS = {"torch": "2.13.0+cpu", "numpy": "2.1"}


@pytest.fixture
def machine(monkeypatch):
    """A made-up machine: installed distributions, modules, and environment."""
    state = {"versions": dict(VERSIONS), "modules": {"psutil"}}
    monkeypatch.setattr(doctor, "_version", lambda name: state["versions"].get(name))
    monkeypatch.setattr(doctor, "_has", lambda name: name in state["modules"])
    for name in ("ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME", doctor.AUTOLOAD, "MS_DEVICE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("sys.dont_write_bytecode", False)
    return state


def found(subject):
    (finding,) = (f for f in doctor.examine() if f.subject == subject)
    return finding


def test_every_finding_that_is_not_fine_has_an_advice(machine):
    machine["versions"].clear()
    machine["modules"].clear()
    findings = doctor.examine()
    assert {f.verdict for f in findings} >= {"ok", "bad"}
    assert all(f.advice for f in findings if f.verdict != "ok")


@pytest.mark.parametrize(
    ("version", "verdict", "advice"),
    [
        (None, "bad", "pip install torch"),
        ("2.5.1", "bad", "2.6 or later"),
        ("2.6.0", "ok", ""),
        ("2.13.0+cpu", "ok", ""),
    ],
)
def test_torch(machine, version, verdict, advice):
    machine["versions"]["torch"] = version
    finding = found("torch")
    assert finding.verdict == verdict
    assert advice in finding.advice


@pytest.mark.parametrize(
    ("environment", "verdict", "words"),
    [
        ({}, "bad", "TORCH_DEVICE_BACKEND_AUTOLOAD=0"),
        ({"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}, "note", "autoload is off"),
        ({"ASCEND_HOME_PATH": "/usr/local/cann"}, "ok", "CANN at /usr/local/cann"),
    ],
)
def test_torch_npu_without_cann_breaks_torch(machine, monkeypatch, environment, verdict, words):
    machine["versions"]["torch_npu"] = "2.13.0"
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    finding = found("torch_npu")
    assert finding.verdict == verdict
    assert words in finding.advice + finding.found


def test_a_wrong_device_name(machine, monkeypatch):
    monkeypatch.delitem(doctor.sys.modules, "mindspeed.device", raising=False)
    monkeypatch.setenv("MS_DEVICE", "abacus")
    assert found("device").verdict == "bad"
    assert "'cpu', 'npu' or 'cuda'" in found("device").advice


def tree(folder, version, training=False):
    core = folder / "megatron" / "core"
    core.mkdir(parents=True)
    numbers = zip(("MAJOR", "MINOR", "PATCH"), version.split("."), strict=True)
    (core / "package_info.py").write_text("".join(f"{n} = {v}\n" for n, v in numbers))
    if training:
        (folder / "megatron" / "training").mkdir()
    return SourceTree("megatron", portions=(folder / "megatron",))


def use(monkeypatch, source):
    for module in ("mindspeed.doctor", "mindspeed.patching.drift"):
        monkeypatch.setattr(f"{module}.installed_source", lambda: source)


def test_no_megatron(machine, monkeypatch):
    use(monkeypatch, None)
    monkeypatch.setattr(doctor, "installed_version", lambda source: None)
    assert "mindspeed[train]" in found("megatron-core").advice


def test_a_megatron_that_is_too_new_or_differs(machine, monkeypatch, tmp_path):
    use(monkeypatch, tree(tmp_path, "0.19.0"))
    assert found("megatron-core").verdict == "bad"
    assert ">=0.14,<0.17" in found("megatron-core").advice
    assert found("level-0 plan").verdict == "bad"
    assert "outside the supported range" in found("level-0 plan").advice


def test_a_checkout_needs_more_packages(machine, monkeypatch, tmp_path):
    use(monkeypatch, tree(tmp_path, "0.16.1", training=True))
    machine["modules"] |= {"six", "regex"}
    finding = found("megatron.training needs")
    assert finding.advice == "pip install pydantic pyyaml"
    assert "has no" in found("level-0 plan").advice or "differs" in found("level-0 plan").advice


def test_psutil_and_numpy(machine, monkeypatch, tmp_path):
    machine["modules"].clear()
    use(monkeypatch, tree(tmp_path, "0.14.0"))
    assert "hangs for ever" in found("psutil").advice
    assert "numpy<2" in found("numpy").advice


def test_missing_levels(machine, monkeypatch):
    monkeypatch.setattr("mindspeed.levels.is_installed", lambda name: False)
    assert found("level 1").verdict == "note"
    assert "mindspeed[l1]" in found("level 1").advice


def test_the_bytecode_cache(machine, monkeypatch, tmp_path):
    source = tree(tmp_path, "0.16.1")
    use(monkeypatch, source)
    assert found("bytecode cache").verdict == "ok"
    assert doctor.bytecode_folder(source).name == "__pycache__"
    monkeypatch.setattr("sys.dont_write_bytecode", True)
    assert "PYTHONDONTWRITEBYTECODE" in found("bytecode cache").advice
    monkeypatch.setattr("sys.dont_write_bytecode", False)
    monkeypatch.setattr(os, "access", lambda place, mode: False)
    assert "PYTHONPYCACHEPREFIX" in found("bytecode cache").advice
    assert Path(found("bytecode cache").found.split(" is ")[0]).name == "__pycache__"
