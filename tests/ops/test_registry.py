"""Who serves a call: order of choice, forcing, refusing, reports, backends from elsewhere."""

import subprocess
import sys
import threading

import pytest
import torch

import ms_ops
from ms_ops import norm, registry
from ms_ops.norm import reference

X, W = torch.randn(3, 8), torch.randn(8)


def kernel(calls, supports=registry.always):
    def forward(*args):
        calls.append("forward")
        return reference.forward(*args)

    return ms_ops.Kernel(forward, reference.backward, supports)


@pytest.fixture
def added():
    """Register backends for rms_norm and take them away again."""
    names = []

    def add(name, priority, supports=registry.always, available=lambda: None):
        calls = []
        kernels = {"rms_norm": kernel(calls, supports)}
        ms_ops.register_backend("rms_norm", ms_ops.Backend(name, priority, kernels, available))
        names.append(name)
        return calls

    yield add
    for name in names:
        ms_ops.unregister_backend("rms_norm", name)


@pytest.fixture
def exact():
    """Turn torch's demand for equal runs on, strictly or with warnings."""
    yield torch.use_deterministic_algorithms
    torch.use_deterministic_algorithms(False)


def chosen():
    facts = norm.OPERATOR.definition.facts(*norm.prepare(X, W))
    return registry.choose("rms_norm", facts)


def test_priority_decides():
    assert chosen() == "portable"


def test_a_lower_number_is_asked_first(added):
    calls = added("fast", 5)
    ms_ops.rms_norm(X, W)
    assert calls == ["forward"]


def test_one_that_declines_is_passed_over(added):
    calls = added("fast", 5, supports=lambda facts: "too small")
    ms_ops.rms_norm(X, W)
    assert calls == []
    assert "fast (priority 5): too small" in ms_ops.explain("rms_norm", X, W)


def test_one_that_is_not_there_is_passed_over(added):
    added("fast", 5, available=lambda: "no such device")
    assert chosen() == "portable"
    with (
        ms_ops.backend(rms_norm="fast"),
        pytest.raises(ms_ops.BackendError, match="no such device"),
    ):
        ms_ops.rms_norm(X, W)


def test_context_beats_set_beats_environment_beats_priority(monkeypatch, added):
    for name in ("one", "two", "three"):
        added(name, 200)
    monkeypatch.setenv("MS_OPS", "rms_norm:one")
    assert chosen() == "one"
    ms_ops.set_backend("rms_norm", "two")
    try:
        assert chosen() == "two"
        with ms_ops.backend(rms_norm="three"):
            assert chosen() == "three"
            with ms_ops.backend("reference"):
                assert chosen() == "three"  # a name for the operator is closer than one for all
        assert chosen() == "two"
    finally:
        ms_ops.set_backend("rms_norm", None)
    assert chosen() == "one"


def test_environment_wildcard_and_refusal(monkeypatch):
    monkeypatch.setenv("MS_OPS", "swiglu:portable, *:reference")
    assert chosen() == "reference"
    monkeypatch.setenv("MS_OPS", "!portable,!compiled")
    assert chosen() == "reference"
    monkeypatch.setenv("MS_OPS", ",".join(f"!{stem}" for stem in registry.STEMS))
    with pytest.raises(ms_ops.BackendError, match="all are refused"):
        chosen()


@pytest.mark.parametrize("text", ["rms_norm", "nosuch:portable", "rms_norm:"])
def test_environment_that_cannot_be_read(monkeypatch, text):
    monkeypatch.setenv("MS_OPS", text)
    with pytest.raises(ValueError, match="need operator:backend"):
        chosen()


def test_unknown_names_are_refused():
    with ms_ops.backend(rms_norm="nosuch"), pytest.raises(ms_ops.BackendError, match="need one of"):
        ms_ops.rms_norm(X, W)
    with pytest.raises(ValueError, match="nosuch"):
        ms_ops.set_backend("nosuch", "portable")
    with pytest.raises(ValueError, match="nosuch"), ms_ops.backend(nosuch="portable"):
        pass
    with pytest.raises(ValueError, match="nosuch"):
        ms_ops.explain("nosuch", X)


def test_a_backend_without_the_kernel_is_refused():
    with pytest.raises(ValueError, match="has no kernel for 'rope'"):
        ms_ops.register_backend("rope", ms_ops.Backend("x", 1, {}))


def test_another_thread_is_not_forced():
    seen = []
    with ms_ops.backend(rms_norm="reference"):
        thread = threading.Thread(target=lambda: seen.append(chosen()))
        thread.start()
        thread.join()
        assert chosen() == "reference"
    assert seen == ["portable"]


def test_backward_runs_where_forward_ran(added):
    calls = []

    def backward(*args):
        calls.append("backward")
        return reference.backward(*args)

    backend = ms_ops.Backend("own", 200, {"rms_norm": ms_ops.Kernel(reference.forward, backward)})
    ms_ops.register_backend("rms_norm", backend)
    try:
        x = X.clone().requires_grad_()
        with ms_ops.backend(rms_norm="own"):
            y = ms_ops.rms_norm(x, W)
        y.backward(torch.randn_like(y))
    finally:
        ms_ops.unregister_backend("rms_norm", "own")
    assert calls == ["backward"]


def test_explain_and_report():
    lines = ms_ops.explain("rms_norm", X, W).splitlines()
    assert lines[0] == "npu (priority 10): torch_npu is not loaded"
    assert lines[-1] == "reference (priority 100): can serve"
    assert lines.index("portable (priority 90): can serve") < len(lines) - 1
    assert [line.split(" ")[0] for line in lines] == list(registry.backends("rms_norm"))
    ms_ops.rms_norm(X, W)
    rows = [(op, facts.device, name) for op, facts, name in ms_ops.report()]
    assert ("rms_norm", "cpu", "portable") in rows


def test_a_backend_is_one_added_file(tmp_path):
    (tmp_path / "npu.py").write_text(
        "from ms_ops.registry import Backend, Kernel\n"
        "from ms_ops.activation import reference\n"
        "kernel = Kernel(reference.forward, reference.backward)\n"
        "BACKEND = Backend('npu', 10, {'swiglu': kernel})\n"
    )
    code = (
        "import sys, torch, ms_ops\n"
        "sys.modules['ms_ops.activation'].__path__.insert(0, sys.argv[1])\n"
        "ms_ops.swiglu(torch.randn(2, 4))\n"
        "print(ms_ops.report()[0][2])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["npu"]


def test_kernels_whose_runs_differ_are_passed_over_on_demand(added, exact):
    loose = ms_ops.Kernel(reference.forward, reference.backward, deterministic=False)
    added("fast", 5)
    ms_ops.register_backend("rms_norm", ms_ops.Backend("fast", 5, {"rms_norm": loose}))
    assert chosen() == "fast"
    exact(True)
    assert chosen() == "portable"
    assert "fast (priority 5): two runs may differ" in ms_ops.explain("rms_norm", X, W)
    with (
        ms_ops.backend(rms_norm="fast"),
        pytest.raises(ms_ops.BackendError, match="use_deterministic_algorithms is on"),
    ):
        ms_ops.rms_norm(X, W)
    exact(True, warn_only=True)
    for _ in range(2):
        with pytest.warns(UserWarning, match=r"ms::rms_norm\[fast\] does not have a determ"):
            assert chosen() == "fast"
    exact(False)
    assert chosen() == "fast"
