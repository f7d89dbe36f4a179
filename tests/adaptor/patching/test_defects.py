"""The defects E1 to E11 of MindSpeed's patch engine, each as a test that this one does not have.

E1 double wrapping, E2 created names, E3 the scan for None, E4 lost descriptors, E5 order of
registration, E6 roles by suffix, E7 references out of reach, E8 conflict messages, E9 triggered
lazy attributes, E10 dummy packages, E11 no undo.
"""

import importlib.metadata
import importlib.util
import sys

import pytest
import torch

from mindspeed.features import load_features
from mindspeed.patching.apply import apply
from mindspeed.patching.errors import PatchError, PlanError

ADD = """
    def plus(amount):
        def wrap(original):
            def wrapper(*args):
                return original(*args) + amount
            return wrapper
        return wrap
    one = plus(1)
    ten = plus(10)
    def new():
        return 100
"""


def test_e1_a_second_wrapper_does_not_wrap_the_first_again(lab):
    lab.write("victim", "def f(): return 0")
    lab.write("values", ADD)
    victim = lab.load("victim")
    first = lab.feature(lab.patch("victim:f", "wrap", "values:one"))
    second = lab.feature(lab.patch("victim:f", "wrap", "values:ten", order=1), name="late")
    handle = apply(lab.plan(first))
    assert victim.f() == 1
    handle.extend(lab.plan(first, second))
    assert victim.f() == 11
    assert apply(lab.plan(first, second)) is handle
    assert victim.f() == 11
    handle.undo()
    assert victim.f() == 0


def test_e2_a_name_that_does_not_exist_is_refused_and_not_created(lab):
    lab.write("victim", "def f(): return 0")
    lab.write("values", ADD)
    victim = lab.load("victim")
    for kind in ("replace", "wrap", "set"):
        with pytest.raises(PatchError, match="victim:g does not exist"):
            lab.apply(lab.patch("victim:g", kind))
        assert not hasattr(victim, "g")


def test_e2_a_missing_target_lets_its_later_import_fail(lab):
    lab.write("victim", "def f(): return 0")
    lab.write("values", ADD)
    lab.apply(lab.patch("victim:g"))
    with pytest.raises(PatchError, match="victim:g"):
        lab.load("victim")
    assert "victim" not in sys.modules


def test_e3_a_patched_none_leaves_other_nones_alone(lab):
    lab.write("victim.a", "kernel = None")
    lab.write("victim.b", "kernel = None")
    lab.write("values", "new = 7")
    a, b = lab.load("victim.a"), lab.load("victim.b")
    with lab.apply(lab.patch("victim.a:kernel", "set")):
        assert (a.kernel, b.kernel) == (7, None)
    assert (a.kernel, b.kernel) == (None, None)


def test_e4_descriptors_keep_their_kind(lab):
    lab.write(
        "victim",
        """
        class C:
            @staticmethod
            def s(x): return x
            @classmethod
            def c(cls, x): return cls, x
            @property
            def p(self): return 1
            @p.setter
            def p(self, value): self.seen = value
            def m(self, x): return self, x
        """,
    )
    lab.write(
        "values",
        """
        def s(x): return x + 1
        def c(original):
            def wrapper(cls, x): return (*original(cls, x), "more")
            return wrapper
        def p(self): return 2
        def m(self, x): return self, x + 1
        """,
    )
    cls = lab.load("victim").C
    before = dict(vars(cls))
    patches = [
        lab.patch("victim:C.s", value="values:s"),
        lab.patch("victim:C.c", "wrap", "values:c"),
        lab.patch("victim:C.p", value="values:p"),
        lab.patch("victim:C.m", value="values:m"),
    ]
    with lab.apply(*patches):
        item = cls()
        assert item.s(1) == cls.s(1) == 2
        assert item.c(1) == cls.c(1) == (cls, 1, "more")
        assert item.p == 2
        item.p = 5
        assert item.seen == 5
        assert item.m(1) == (item, 2)
        kinds = {name: type(vars(cls)[name]) for name in "scpm"}
        assert kinds == {name: type(before[name]) for name in "scpm"}
    assert all(vars(cls)[name] is before[name] for name in "scpm")


def test_e5_the_result_does_not_depend_on_the_order_of_the_records(lab):
    lab.write("victim", "def f(): return 0")
    lab.write("values", ADD)
    victim = lab.load("victim")
    replace = lab.patch("victim:f")
    one = lab.patch("victim:f", "wrap", "values:one")
    for patches in ((replace, one), (one, replace)):
        with lab.apply(*patches):
            assert victim.f() == 101


def test_e5_two_features_on_one_target_must_give_an_order(lab):
    first = lab.feature(lab.patch("victim:f"), name="first")
    second = lab.feature(lab.patch("victim:f", "wrap"), name="second")
    with pytest.raises(PlanError, match="which one is inside"):
        lab.plan(first, second)
    below = lab.feature(lab.patch("victim:f", "wrap", order=-1), name="second")
    with pytest.raises(PlanError, match="would undo the other"):
        lab.plan(first, below)
    assert len(
        lab.plan(first, lab.feature(lab.patch("victim:f", "wrap", order=1), name="b")).acting
    )


def test_e6_the_role_is_the_kind_and_never_the_name(lab):
    lab.write("victim", "def f(): return 0")
    lab.write("values", "def f_wrapper(): return 5\ndef g(f):\n  return lambda: f() + 1\nh = g")
    victim = lab.load("victim")
    with lab.apply(lab.patch("victim:f", "replace", "values:f_wrapper")):
        assert victim.f() == 5
    with lab.apply(lab.patch("victim:f", "wrap", "values:h")):
        assert victim.f() == 1


def test_e7_copies_are_rebound_and_what_cannot_be_is_reported(lab):
    lab.write("victim.base", "def f(): return 0\nclass Base: pass")
    lab.write("victim.copy", "from victim.base import f\nfrom victim.base import f as g")
    lab.write(
        "victim.user",
        """
        from dataclasses import dataclass
        from functools import partial
        from victim.base import Base, f as _f
        @dataclass
        class ModuleSpec:
            module: object
            submodules: object = None
        TABLE = {"key": [_f]}
        SPEC = ModuleSpec(Base, ModuleSpec(_f))
        PARTIAL = partial(_f)
        class Sub(Base): pass
        class Holder:
            method = staticmethod(_f)
        def default(x=_f): return x()
        def keyword(*, x=_f): return x()
        def make(inner):
            def closed(): return inner()
            return closed
        closed = make(_f)
        """,
    )
    lab.write("values", "def new(): return 1\nclass New: pass")
    copy, user = lab.load("victim.copy"), lab.load("victim.user")
    handle = lab.apply(
        lab.patch("victim.base:f"), lab.patch("victim.base:Base", value="values:New")
    )
    assert copy.f() == copy.g() == user._f() == 1
    lab.write("victim.later", "from victim.base import f")
    assert lab.load("victim.later").f() == 1
    stale = {row.target: set(row.stale) for row in handle.report().rows}
    assert stale["victim.base:f"] == {
        "victim.user:TABLE['key'][0]",
        "victim.user:SPEC.submodules.module",
        "victim.user:PARTIAL.func",
        "victim.user:Holder.method",
        "victim.user:default default 0",
        "victim.user:keyword default x",
        "victim.user:closed closure inner",
    }
    assert stale["victim.base:Base"] == {"victim.user:SPEC.module", "victim.user:Sub base Base"}
    handle.undo()
    assert copy.f() == copy.g() == user._f() == lab.load("victim.later").f() == 0


def test_e7_an_alias_is_followed_by_name_and_what_it_names_is_left_alone(lab):
    """`Norm = Base` is patched as a variable; `Base` itself, at home elsewhere, stays."""
    lab.write("victim.base", "class Base: pass")
    lab.write("victim.alias", "from victim.base import Base\nNorm = Base")
    lab.write(
        "victim.user", "from victim.alias import Norm\nfrom victim.base import Base\nOld = Base"
    )
    lab.write("values", "class New: pass\nnew = New")
    alias, user, base = (lab.load(f"victim.{name}") for name in ("alias", "user", "base"))
    original, new = base.Base, lab.load("values").New
    with lab.apply(lab.patch("victim.alias:Norm", "set")) as handle:
        assert alias.Norm is user.Norm is new
        assert base.Base is alias.Base is user.Base is user.Old is original
        assert handle.report().stale == ()
    assert alias.Norm is user.Norm is original


def test_e7_strict_refuses_what_cannot_be_reached(lab):
    lab.write("victim", "def f(): return 0\ndef g(x=f): return x()")
    lab.write("values", ADD)
    victim = lab.load("victim")
    original = victim.f
    with pytest.raises(PatchError, match="victim:g default 0 still holds victim:f"):
        lab.apply(lab.patch("victim:f"), strict=True)
    assert victim.f is original


def test_e7_holders_outside_the_package_are_reported_and_left_alone(lab):
    lab.write("victim", "def f(): return 0")
    lab.write("values", ADD + "\n    from victim import f as held")
    values = lab.load("values")
    with lab.apply(lab.patch("victim:f")) as handle:
        assert handle.report().stale == ("values:held (outside victim) still holds victim:f",)
        assert values.held() == 0


def test_e8_a_conflict_names_both_features_both_flags_and_the_full_target(lab):
    from mindspeed.patching import Flag

    target = "megatron.core.transformer.mlp:MLP.forward"
    first = lab.feature(
        lab.patch(target), name="memory.first", flags=(Flag("--first-flag", help="h"),)
    )
    second = lab.feature(
        lab.patch(target), name="moe.second", flags=(Flag("--second-flag", help="h"),)
    )
    with pytest.raises(PlanError) as caught:
        lab.plan(first, second, config={"first_flag": True, "second_flag": True})
    message = str(caught.value)
    for word in ("memory.first", "moe.second", "--first-flag", "--second-flag", target):
        assert word in message


def test_e9_no_lazy_attribute_is_triggered(lab):
    lab.write(
        "victim.lazy",
        """
        asked = []
        def __getattr__(name):
            asked.append(name)
            raise AttributeError(name)
        """,
    )
    lab.write("victim.base", "def new(): return 0")
    lab.write("values", ADD)
    lazy = lab.load("victim.lazy")
    lab.load("victim.base")
    lazy.asked.clear()
    operators, classes = set(vars(torch.ops)), set(vars(torch.classes))
    with lab.apply(lab.patch("victim.base:new")):
        pass
    assert lazy.asked == []
    assert set(vars(torch.ops)) == operators
    assert set(vars(torch.classes)) == classes


def test_e9_odd_objects_are_walked_past_and_not_into(lab):
    lab.write(
        "victim.odd",
        """
        from dataclasses import dataclass
        from victim.base import f as _f
        class Lazy:
            @property
            def __class__(self): raise RuntimeError("asked for its class")
            def __getattr__(self, name): raise RuntimeError("asked for " + name)
            def __eq__(self, other): raise RuntimeError("compared")
            __hash__ = None
        @dataclass(slots=True)
        class Slots:
            a: object
            b: object = None
        class Computing(dict):
            def items(self): raise RuntimeError("computed")
        lazy, slots, table = Lazy(), Slots(_f), Computing(x=_f)
        del slots.b
        loop = []
        loop.append(loop)
        """,
    )
    lab.write("victim.base", "def f(): return 0")
    lab.write("values", ADD)
    lab.load("victim.odd")
    with lab.apply(lab.patch("victim.base:f")) as handle:
        (row,) = handle.report().rows
        assert set(row.stale) == {"victim.odd:slots.a", "victim.odd:table['x']"}


def test_e10_no_package_is_pretended(lab):
    lab.write("victim.leaf", "raise ImportError('no triton')")
    lab.write(
        "values",
        """
        from types import ModuleType
        def stub(name):
            module = ModuleType(name)
            module.enabled = lambda: False
            return module
        """,
    )
    packages = ("transformer_engine", "apex", "amp_C", "flash_attn", "triton")
    present = {name: importlib.util.find_spec(name) is not None for name in packages}
    asked = importlib.metadata.version
    with lab.apply(lab.patch("victim.leaf", "stub_module", "values:stub")):
        import victim.leaf

        assert victim.leaf.enabled() is False
        assert {name: importlib.util.find_spec(name) is not None for name in packages} == present
        assert importlib.metadata.version is asked
    assert "victim.leaf" not in sys.modules
    assert not hasattr(sys.modules["victim"], "leaf")
    stubs = [
        patch.target
        for feature in load_features()
        for patch in feature.patches
        if patch.kind == "stub_module"
    ]
    assert all(target.startswith("megatron.") for target in stubs)


def test_e11_undo_restores_the_very_objects(lab):
    lab.write("victim", "def f(): return 0\nclass C:\n  def m(self): return 0\nx = [1]")
    lab.write("values", ADD + "\n    y = [2]")
    victim = lab.load("victim")
    before = {name: id(value) for name, value in vars(victim).items()}
    method = vars(victim.C)["m"]
    handle = lab.apply(
        lab.patch("victim:f"),
        lab.patch("victim:C.m", "wrap", "values:one"),
        lab.patch("victim:C.added", "add", "values:new"),
        lab.patch("victim:x", "set", "values:y"),
        lab.patch("victim:fresh", "add"),
    )
    assert (victim.f(), victim.C().m(), victim.fresh(), victim.x) == (100, 1, 100, [2])
    handle.undo()
    handle.undo()
    assert {name: id(value) for name, value in vars(victim).items()} == before
    assert vars(victim.C)["m"] is method
    assert "added" not in vars(victim.C)


def test_e11_renamed_copies_of_a_replaced_class_come_back(lab):
    lab.write("victim.base", "class C: pass")
    lab.write("victim.user", "from victim.base import C as K, C")
    lab.write("values", "class New: pass")
    user = lab.load("victim.user")
    original = user.C
    with lab.apply(lab.patch("victim.base:C", value="values:New")) as handle:
        assert user.K is user.C is lab.load("values").New
        assert set(handle.report().rows[0].rebound) == {"victim.user:K", "victim.user:C"}
    assert user.K is user.C is original


def test_e11_undo_never_removes_what_somebody_else_put_there(lab):
    lab.write("victim", "def f(): return 0\ndef g(): return 0")
    lab.write("values", ADD)
    victim = lab.load("victim")
    original = victim.g
    handle = lab.apply(lab.patch("victim:f"), lab.patch("victim:g"))
    victim.f = foreign = lambda: "foreign"
    with pytest.raises(PatchError, match="victim:f was changed by somebody else"):
        handle.undo()
    assert victim.f is foreign
    assert victim.g is original
