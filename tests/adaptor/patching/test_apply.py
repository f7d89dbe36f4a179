"""Handles: one plan at a time, extension, probes, stubs, and reports."""

import sys

import pytest
import torch

from mindspeed.patching.apply import activate, active_handle, apply
from mindspeed.patching.errors import PatchError, PlanError, StalePlanError
from mindspeed.patching.plan import draft

VALUES = """
    from types import ModuleType
    def new(): return 1
    def wrap(original):
        def wrapper(): return original() + 10
        return wrapper
    def not_a_function(original): return 3
    def yes(module): return True
    def no(module): return False
    def stub(name):
        module = ModuleType(name)
        module.value = "stub"
        return module
    def no_stub(name): return {}
"""


@pytest.fixture
def victim(lab):
    lab.write("victim", "def f(): return 0\ndef g(): return 0\nx = 1")
    lab.write("values", VALUES)
    return lab.load("victim")


def test_nested_use_of_one_plan_ends_with_the_outermost(lab, victim):
    made = lab.plan(lab.feature(lab.patch("victim:f")))
    with apply(made) as outer:
        with apply(made) as inner:
            assert inner is outer
        assert victim.f() == 1
    assert victim.f() == 0
    assert active_handle() is None


@pytest.mark.parametrize("home", ["a", "b"])
def test_namesakes_that_share_a_value_are_kept_apart(lab, victim, home):
    lab.write("pair.a", "Norm = [1]")
    lab.write("pair.b", "Norm = [2]")
    lab.write("pair.c", f"from pair.{home} import Norm")
    a, b, c = (lab.load(f"pair.{name}") for name in "abc")
    before = a.Norm, b.Norm, c.Norm
    patches = [lab.patch(f"pair.{name}:Norm", "set") for name in "ab"]
    with lab.apply(*patches):
        assert a.Norm is b.Norm is c.Norm is lab.load("values").new
    assert (a.Norm, b.Norm) == ([1], [2])
    assert all(now is then for now, then in zip((a.Norm, b.Norm, c.Norm), before, strict=True))


def test_two_plans_at_once_are_refused(lab, victim):
    with lab.apply(lab.patch("victim:f")):
        with pytest.raises(StalePlanError, match="undo it before applying"):
            lab.apply(lab.patch("victim:g"))
        assert (victim.f(), victim.g()) == (1, 0)


def test_a_plan_with_problems_is_never_applied(lab, victim):
    conflict = [lab.feature(lab.patch("victim:f"), name=name) for name in ("one", "two")]
    with pytest.raises(PatchError, match="has problems"):
        apply(lab.plan(*conflict, draft_only=True))
    assert victim.f() == 0


def test_a_plan_for_another_megatron_is_refused(lab, victim, monkeypatch):
    monkeypatch.setattr("mindspeed.patching.apply.installed_version", lambda source: "0.15.1")
    other = draft(features=[lab.feature(lab.patch("victim:f"))], megatron="0.14.0")
    with pytest.raises(StalePlanError, match=r"made for megatron-core 0.14.0, and 0.15.1 is"):
        apply(other)


def test_a_handle_extends_and_refuses_what_would_take_back(lab, victim):
    first = lab.feature(lab.patch("victim:f"), name="first")
    second = lab.feature(lab.patch("victim:g"), name="second")
    handle = apply(lab.plan(first))
    handle.extend(lab.plan(first, second))
    assert (victim.f(), victim.g()) == (1, 1)
    with pytest.raises(StalePlanError, match=r"does not contain it \(victim:f\)"):
        handle.extend(lab.plan(second))
    assert (victim.f(), victim.g()) == (1, 1)
    handle.undo()
    assert (victim.f(), victim.g()) == (0, 0)
    with pytest.raises(StalePlanError, match="was undone"):
        handle.extend(lab.plan(first))


def test_a_failed_extension_leaves_the_first_plan_in_force(lab, victim):
    first = lab.feature(lab.patch("victim:f"), lab.patch("victim_later:y", "add"), name="first")
    wrap = lab.patch("victim:f", "wrap", "values:wrap", order=1)
    broken = lab.feature(
        wrap,
        lab.patch("victim:g"),
        lab.patch("victim:missing"),
        lab.patch("victim_other:x"),
        lab.patch("victim_leaf.stub", "stub_module", "values:stub"),
        name="broken",
    )
    handle = apply(lab.plan(first))
    victim.f()
    finders, report = list(sys.meta_path), handle.report()
    with pytest.raises(PatchError, match="victim:missing"):
        handle.extend(lab.plan(first, broken))
    assert handle.active
    assert handle.plan.features == ("first",)
    assert (victim.f(), victim.g()) == (1, 0)
    assert [row.target for row in handle.report().rows] == [row.target for row in report.rows]
    assert len(sys.meta_path) == len(finders)
    handle.undo()
    assert victim.f() == 0


def test_an_extension_keeps_the_counts_of_what_it_does_not_touch(lab, victim):
    first = lab.feature(lab.patch("victim:f"), name="first")
    second = lab.feature(lab.patch("victim:g"), name="second")
    handle = apply(lab.plan(first))
    victim.f()
    handle.extend(lab.plan(first, second))
    victim.f()
    assert handle.calls() == {"victim:f": 2, "victim:g": 0}


def test_activate_adds_to_what_is_in_force(lab, victim, monkeypatch):
    from mindspeed.patching.records import Flag
    from mindspeed.patching.table import make_table

    base = lab.feature(lab.patch("victim:f"), name="base")
    extra = lab.feature(
        lab.patch("victim:g"), name="extra", level=2, flags=(Flag("--a-extra", help="h"),)
    )
    table = make_table([base, extra], {"optimization_level": None})
    monkeypatch.setattr("mindspeed.features.load_table", lambda: table)
    # The victim is no part of Megatron: plan as where none is installed.
    monkeypatch.setattr("mindspeed.patching.drift.installed_source", lambda: None)
    monkeypatch.setattr("mindspeed.patching.apply.installed_source", lambda: None)
    handle = activate({}, level=0, device="cpu")
    assert activate({"a_extra": True}, level=2, device="cpu") is handle
    assert (victim.f(), victim.g()) == (1, 1)
    assert activate({"a_extra": True}, level=2, device="cpu") is handle
    hooks = sys.modules["torch.optim.optimizer"]._global_optimizer_post_hooks
    assert len(hooks) == 1
    with pytest.raises(StalePlanError):
        activate({}, level=2, device="cpu")
    with pytest.raises(PlanError, match="--optimization-level 2"):
        activate({"a_extra": True}, level=1, device="cpu")
    handle.undo()
    assert len(hooks) == 0


def test_the_first_step_tells_what_nobody_called(lab, victim, caplog):
    asked = lab.feature(lab.patch("victim:f"), lab.patch("victim:g"), name="ops.asked", level=1)
    lab.write("victim2.repair", "def f(): return 0")
    lab.load("victim2.repair")
    repair = lab.feature(lab.patch("victim2.repair:f"), name="level0.repair")
    caplog.set_level("INFO", logger="mindspeed")
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    with apply(lab.plan(asked, repair)) as handle:
        handle.watch_first_step()
        handle.watch_first_step()
        victim.f()
        assert caplog.messages == []
        optimizer.step()
        optimizer.step()
        assert [(r.levelname, r.getMessage()) for r in caplog.records] == [
            ("WARNING", "not called in the first step on this rank, so without effect:"
                        " victim:g (ops.asked)"),
            ("INFO", "repairs that the first step did not reach: victim2.repair:f"),
        ]  # fmt: skip


def test_an_undone_handle_no_longer_watches(lab, victim, caplog):
    caplog.set_level("INFO", logger="mindspeed")
    with lab.apply(lab.patch("victim:f")) as handle:
        handle.watch_first_step()
    torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1).step()
    assert caplog.messages == []


@pytest.mark.parametrize(
    ("probe", "status", "value"), [("yes", "applied", 1), ("no", "not needed", 0)]
)
@pytest.mark.parametrize("imported", [True, False])
def test_a_probe_decides_once_the_module_is_there(lab, victim, probe, status, value, imported):
    if not imported:
        del sys.modules["victim"]
    with lab.apply(lab.patch("victim:f", probe=f"values:{probe}")) as handle:
        assert lab.load("victim").f() == value
        (row,) = handle.report().rows
        assert row.status == status
        assert handle.never_called() == ()
    assert lab.load("victim").f() == 0


def test_a_wrap_must_return_a_plain_function(lab, victim):
    with pytest.raises(PatchError, match="values:not_a_function must return a plain function"):
        lab.apply(lab.patch("victim:f", "wrap", "values:not_a_function"))
    with pytest.raises(PatchError, match="victim:x is 1, which cannot be wrapped"):
        lab.apply(lab.patch("victim:x", "wrap", "values:wrap"))


def test_add_refuses_a_name_that_exists(lab, victim):
    with pytest.raises(PatchError, match="victim:f exists already"):
        lab.apply(lab.patch("victim:f", "add"))


def test_a_value_that_cannot_be_loaded_names_the_reference(lab, victim):
    with pytest.raises(PatchError, match="cannot load values:nothing"):
        lab.apply(lab.patch("victim:f", value="values:nothing"))
    with pytest.raises(PatchError, match="cannot load no_values:new"):
        lab.apply(lab.patch("victim:f", value="no_values:new"))


def test_a_stub_replaces_a_loaded_leaf_and_gives_it_back(lab, victim):
    lab.write("victim2.leaf", "value = 'real'")
    leaf = lab.load("victim2.leaf")
    package = sys.modules["victim2"]
    with lab.apply(lab.patch("victim2.leaf", "stub_module", "values:stub")) as handle:
        import victim2.leaf as stubbed

        assert stubbed.value == "stub"
        assert package.leaf is stubbed
        assert handle.report().rows[0].status == "applied"
    assert sys.modules["victim2.leaf"] is leaf
    assert package.leaf is leaf


def test_a_stub_whose_probe_says_no_is_not_needed(lab, victim):
    lab.write("victim2.leaf", "value = 'real'")
    patch = lab.patch("victim2.leaf", "stub_module", "values:stub", probe="values:no")
    with lab.apply(patch) as handle:
        assert lab.load("victim2.leaf").value == "real"
        assert handle.report().rows[0].status == "not needed"


def test_a_stub_must_be_a_module(lab, victim):
    with lab.apply(lab.patch("victim2.leaf", "stub_module", "values:no_stub")):
        lab.write("victim2.other")
        with pytest.raises(PatchError, match="must be a module"):
            lab.load("victim2.leaf")


def test_the_report_is_readable_and_stays_after_undo(lab, victim):
    lab.write("user", "from victim import f as held")
    handle = lab.apply(lab.patch("victim:f"), lab.patch("victim_later:x"))
    victim.f()
    text = str(handle.report())
    assert "applied    victim:f [replace], 1 calls" in text
    assert "waiting    victim_later:x [replace]" in text
    handle.undo()
    assert str(handle.report()) == text


def test_an_undone_handle_leaves_no_finder(lab, victim):
    finders = list(sys.meta_path)
    handle = lab.apply(
        lab.patch("victim_later:x"), lab.patch("victim2.leaf", "stub_module", "values:stub")
    )
    assert len(sys.meta_path) == len(finders) + 2
    handle.undo()
    assert sys.meta_path == finders
