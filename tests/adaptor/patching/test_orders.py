"""Every order of import, apply and undo leads to the same state, for every shape of target.

A shape is a subclass with sources and patches; the orders are inherited. Each order runs in a
process of its own, forked from one interpreter per shape that has loaded nothing but the engine.
"""

import itertools
import subprocess
import sys
import textwrap

import pytest

LETTERS = "IAU"


def words(longest=4):
    """Every sequence of import, apply, undo up to a length with exactly one import."""
    for length in range(1, longest + 1):
        for letters in itertools.product(LETTERS, repeat=length):
            if letters.count("I") == 1:
                yield "".join(letters)


DRIVER = """
import importlib, os, sys, traceback
sys.path.insert(0, {folder!r})
from mindspeed.patching.apply import active_handle, apply
from mindspeed.patching.plan import plan
from mindspeed.patching.records import Feature, Patch
patches = {patches}
feature = Feature("orders", 0, patches=tuple(Patch(*p, reason="test") for p in patches), doc="d")
made = plan(features=[feature], megatron={version!r}, device="cpu")

def state():
    return eval({look!r}, {{"victim": sys.modules["victim"]}})

def run(word):
    handle, finders = None, list(sys.meta_path)
    for letter in word:
        if letter == "I":
            importlib.import_module("victim")
        elif letter == "A":
            handle = apply(made)
        elif handle is not None:
            handle.undo()
        wanted = {new!r} if active_handle() else {old!r}
        if "victim" in sys.modules:
            assert state() == wanted, f"{{word}} after {{letter}}: {{state()}}, not {{wanted}}"
    if active_handle() is None:
        assert sys.meta_path == finders, f"{{word}}: a finder was left behind"

for word in {words}:
    child = os.fork()
    if not child:
        try:
            run(word)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        print("FAILED", word)
assert "torch" not in sys.modules
print("DONE")
"""


class OrderMatrix:
    """Supply `victim` and `values` (sources), `patches`, and `look`, an expression over `victim`.

    `look` gives `old` while nothing is applied and `new` while the plan is in force.
    """

    victim: str
    values: str
    patches: tuple
    look: str
    old = (0,)
    new = (1,)

    def test_every_order(self, lab):
        lab.write("victim", self.victim)
        lab.write("values", self.values)
        text = textwrap.dedent(DRIVER).format(
            folder=str(lab.folder),
            patches=self.patches,
            version=lab.version,
            look=self.look,
            old=self.old,
            new=self.new,
            words=list(words()),
        )
        done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True)
        assert "FAILED" not in done.stdout, done.stdout + done.stderr
        assert done.stdout.strip() == "DONE", done.stderr


class TestFunction(OrderMatrix):
    victim = "def f(): return 0"
    values = "def new(): return 1"
    patches = (("victim:f", "replace", "values:new"),)
    look = "(victim.f(),)"


class TestWrappedFunction(OrderMatrix):
    victim = "def f(): return 0"
    values = "def wrap(f):\n  def g(): return f() + 1\n  return g"
    patches = (("victim:f", "wrap", "values:wrap"),)
    look = "(victim.f(),)"


class TestReplacedAndWrapped(OrderMatrix):
    victim = "def f(): return 0"
    values = "def new(): return -1\ndef wrap(f):\n  def g(): return f() + 2\n  return g"
    patches = (
        ("victim:f", "wrap", "values:wrap"),
        ("victim:f", "replace", "values:new"),
    )
    look = "(victim.f(),)"


class TestMethods(OrderMatrix):
    victim = """
        class C:
            def m(self): return 0
            @staticmethod
            def s(): return 0
            @classmethod
            def c(cls): return 0
            @property
            def p(self): return 0
        class D(C): pass
    """
    values = "def m(self): return 1\ndef s(): return 1\ndef c(cls): return 1\ndef p(self): return 1"
    patches = tuple((f"victim:C.{name}", "replace", f"values:{name}") for name in "mscp")
    look = "(victim.D().m(), victim.D().s(), victim.D.c(), victim.D().p)"
    old, new = (0, 0, 0, 0), (1, 1, 1, 1)


class TestClass(OrderMatrix):
    victim = "class C:\n  x = 0"
    values = "class New:\n  x = 1"
    patches = (("victim:C", "replace", "values:New"),)
    look = "(victim.C.x,)"


class TestVariable(OrderMatrix):
    victim = "x = None"
    values = "new = 1"
    patches = (("victim:x", "set", "values:new"),)
    look = "(victim.x,)"
    old = (None,)


class TestAddedName(OrderMatrix):
    victim = ""
    values = "new = 1"
    patches = (("victim:x", "add", "values:new"),)
    look = "(getattr(victim, 'x', 0),)"


class TestCopyInsideThePackage(OrderMatrix):
    """The package's own `__init__` holds the function by value."""

    victim = "import victim_parts as package, victim_parts.impl as impl"
    values = "def new(): return 1"
    patches = (("victim_parts.impl:f", "replace", "values:new"),)
    look = "(victim.impl.f(), victim.package.f())"
    old, new = (0, 0), (1, 1)

    @pytest.fixture(autouse=True)
    def _package(self, lab):
        lab.write("victim_parts.impl", "def f(): return 0")
        (lab.folder / "victim_parts" / "__init__.py").write_text("from victim_parts.impl import f")


def test_the_words_are_all_there():
    found = list(words())
    assert len(found) == len(set(found)) == 1 + 4 + 12 + 32
    assert {"I", "AI", "IA", "AUI", "AIUA", "AAIU", "IAUU"} <= set(found)
