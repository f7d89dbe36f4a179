"""Random sets of patches: applying and undoing is the identity, whatever was imported when."""

import sys
import uuid

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mindspeed.patching.apply import apply
from mindspeed.patching.errors import PatchError

VICTIM = """
    def f(): return 0
    def g(): return 0
    x = None
    y = [1]
    class C:
        z = 3
        def m(self): return 0
        @staticmethod
        def s(): return 0
        @classmethod
        def c(cls): return 0
        @property
        def p(self): return 0
        class Inner:
            def m(self): return 0
"""
COPIES = "from {0}.a import f, g, C, y\nfrom {0}.a import f as renamed\nheld = (f, C)\n"
VALUES = """
    def new(*args): return "new"
    def wrap(original):
        def wrapper(*args): return ("wrapped", original(*args))
        return wrapper
    thing = object()
"""
FUNCTIONS = ["f", "g", "C.m", "C.s", "C.c", "C.p", "C.Inner.m"]

_replace = st.tuples(st.sampled_from(FUNCTIONS), st.just("replace"), st.just("values:new"))
_wrap = st.tuples(st.sampled_from(FUNCTIONS), st.just("wrap"), st.just("values:wrap"))
_set = st.tuples(st.sampled_from(["x", "y", "C.z"]), st.just("set"), st.just("values:thing"))
_add = st.tuples(st.sampled_from(["n", "C.n"]), st.just("add"), st.just("values:thing"))
_sets = st.lists(_replace | _wrap | _set | _add, min_size=1, max_size=8, unique_by=lambda p: p[:2])


def snapshot(package):
    """Identity of every attribute of every module and class of a package."""
    found = {}
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] == package:
            for key, value in vars(module).items():
                if key != "__builtins__":
                    found[f"{name}:{key}"] = id(value)
                if isinstance(value, type) and value.__module__.startswith(package):
                    members = vars(value).items()
                    found.update((f"{name}:{key}.{k}", id(v)) for k, v in members if k[0] != "_")
    return found


@given(patches=_sets, early=st.booleans(), late=st.booleans())
@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_apply_then_undo_is_the_identity(lab, patches, early, late):
    package = f"victim_{uuid.uuid4().hex[:8]}"
    lab.write(f"{package}.a", VICTIM)
    lab.write(f"{package}.b", COPIES.format(package))
    lab.write("values", VALUES)
    records = [lab.patch(f"{package}.a:{path}", kind, value) for path, kind, value in patches]
    setters = [p.target for p in records if p.kind != "wrap"]
    assert len(setters) == len(set(setters))
    if early:
        lab.load(f"{package}.b")
    before = snapshot(package)
    handle = lab.apply(*records)
    victim, copies = lab.load(f"{package}.a"), lab.load(f"{package}.b")
    assert apply(handle.plan) is handle
    for path in {path for path, kind, _ in patches if path in ("f", "g")}:
        assert getattr(copies, path) is getattr(victim, path)
        assert getattr(victim, path)() != 0
    assert all(row.status == "applied" for row in handle.report().rows)
    if late:
        lab.write(f"{package}.c", COPIES.format(package))
        lab.load(f"{package}.c")
    handle.undo()
    after = snapshot(package)
    if early:
        assert {key: after[key] for key in before} == before
    assert victim.f() == victim.g() == victim.C().m() == victim.C.c() == victim.C().p == 0
    for name in ("b", "c") if late else ("b",):
        user = sys.modules[f"{package}.{name}"]
        assert (user.f, user.g, user.renamed) == (victim.f, victim.g, victim.f)
    assert not hasattr(victim, "n")
    assert all(sys.modules[f"{package}.{n}"].y is victim.y for n in ("b", "c")[: 1 + late])
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        del sys.modules[name]


@given(patches=_sets, data=st.data())
@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_a_failing_set_changes_nothing(lab, patches, data):
    package = f"victim_{uuid.uuid4().hex[:8]}"
    lab.write(f"{package}.a", VICTIM)
    lab.write(f"{package}.b", COPIES.format(package))
    lab.write("values", VALUES)
    records = [lab.patch(f"{package}.a:{path}", kind, value) for path, kind, value in patches]
    bad = lab.patch(
        f"{package}.a:{data.draw(st.sampled_from(['no', 'C.no', 'C.Inner.no', 'D.m']))}"
    )
    place = data.draw(st.integers(0, len(records)))
    lab.load(f"{package}.b")
    before, finders = snapshot(package), list(sys.meta_path)
    with pytest.raises(PatchError, match=r"no|not a class"):
        lab.apply(*records[:place], bad, *records[place:])
    assert snapshot(package) == before
    assert sys.meta_path == finders
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        del sys.modules[name]
