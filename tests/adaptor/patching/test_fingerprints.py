"""Signatures: recorded from source, compared before anything is applied."""

import shutil
import zipfile

import pytest

from mindspeed.cli import main
from mindspeed.features import load_features
from mindspeed.patching import fingerprints as prints
from mindspeed.patching.errors import PlanError
from mindspeed.patching.facts import facts_of
from mindspeed.patching.plan import draft, plan
from mindspeed.patching.source import SourceError, SourceTree, installed_source, open_source

MEGATRON = installed_source()
needs_megatron = pytest.mark.skipif(MEGATRON is None, reason="megatron-core is not installed")
TARGET = "megatron.core.tensor_parallel.mappings:_gather_along_first_dim"


def facts(lab, source, path):
    lab.write("victim.x", source)
    tree = SourceTree("victim", portions=(lab.folder / "victim",))
    return facts_of(tree.parse("victim.x"), path)


@pytest.mark.parametrize(
    ("source", "path", "expected"),
    [
        ("def f(a, /, b: int = 1, *c, d=None, **e) -> int: pass", "f",
         ("def(a, /, b=1, *c, d=None, **e)",)),
        ("async def f(): pass", "f", ("async def()",)),
        ("class C(A, B, metaclass=M): pass", "C", ("class(A, B, metaclass=M)",)),
        ("@dataclass\nclass C:\n  a: int\n  b: int = 1\n  def m(self): pass", "C",
         ("class() fields(a, b)",)),
        ("class C:\n  @staticmethod\n  @other\n  def s(x): pass", "C.s",
         ("staticmethod def(x)",)),
        ("class C:\n  @property\n  def p(self): pass\n  @p.setter\n  def p(self, v): pass", "C.p",
         ("property def(self)", "p.setter def(self, v)")),
        ("class C:\n  class D:\n    def m(self): pass", "C.D.m", ("def(self)",)),
        ("x: int = 1", "x", ("value",)),
        ("(x, [y, z]) = 1, [2, 3]", "z", ("value",)),
        ("from a.b import c as d", "d", ("import a.b:c",)),
        ("from . import c", "c", ("import .:c",)),
        ("import a.b", "a", ("import a",)),
        ("try:\n  from a import f\nexcept ImportError:\n  def f(x): pass\nelse:\n  f = 1", "f",
         ("import a:f", "def(x)", "value")),
        ("if True:\n  def f(): pass\nelse:\n  def f(): pass", "f", ("def()",)),
        ("with x:\n  def f(): pass", "f", ("def()",)),
        ("def g():\n  def f(): pass", "f", ()),
        ("class C:\n  pass", "C.m", ()),
        ("", "f", ()),
    ],
)  # fmt: skip
def test_facts(lab, source, path, expected):
    assert facts(lab, source, path) == expected


def copy_megatron(tmp_path, module, before, after):
    """A copy of the installed sources with one text changed in one file."""
    root = tmp_path / "copy"
    for portion in MEGATRON.portions:
        shutil.copytree(
            portion / "core", root / "megatron" / "core", ignore=lambda _, names: [
                name for name in names if not name.endswith(".py") and "." in name
            ], dirs_exist_ok=True,
        )  # fmt: skip
    path = root.joinpath(*module.split(".")).with_suffix(".py")
    text = path.read_text()
    assert before in text
    path.write_text(text.replace(before, after))
    return root


@needs_megatron
def test_a_renamed_parameter_is_refused_with_the_name_of_the_target(tmp_path):
    module = TARGET.partition(":")[0]
    root = copy_megatron(tmp_path, module, "use_global_buffer", "use_shared_buffer")
    with pytest.raises(PlanError) as caught:
        plan(level=0, device="cpu", megatron=root)
    (problem,) = caught.value.problems
    assert TARGET in problem
    assert "use_global_buffer" in problem
    assert "use_shared_buffer" in problem
    step = next(s for s in draft(level=0, device="cpu", megatron=root).steps
                if s.patch.target == TARGET)  # fmt: skip
    assert step.status == "refused"


@needs_megatron
def test_a_removed_function_is_refused(tmp_path):
    module, _, name = TARGET.partition(":")
    root = copy_megatron(tmp_path, module, f"def {name}(", f"def {name}_v2(")
    with pytest.raises(PlanError, match=f"{name}.*found no such name"):
        plan(level=0, device="cpu", megatron=root)


@needs_megatron
def test_an_unchanged_copy_is_accepted(tmp_path):
    root = copy_megatron(tmp_path, "megatron.core.utils", "def ", "def ")
    assert plan(level=0, device="cpu", megatron=root).acting


@needs_megatron
def test_a_version_outside_the_range_is_refused_with_the_drifted_targets(tmp_path):
    module = TARGET.partition(":")[0]
    root = copy_megatron(tmp_path, module, "use_global_buffer", "use_shared_buffer")
    info = root / "megatron" / "core" / "package_info.py"
    info.write_text("MAJOR = 0\nMINOR = 19\nPATCH = 0\nPRE_RELEASE = 'rc1'\n")
    with pytest.raises(PlanError) as caught:
        plan(level=0, device="cpu", megatron=root)
    (problem,) = caught.value.problems
    assert "0.19.0rc1 is outside the supported range >=0.14,<0.17" in problem
    assert TARGET in problem
    assert "is_te_min_version" not in problem  # the same there


def test_a_named_version_outside_the_range_is_refused():
    for version in ("0.13.1", "0.17.0"):
        with pytest.raises(PlanError, match="outside the supported range"):
            plan(level=0, megatron=version)


def test_versions():
    assert prints.in_range("0.14.0")
    assert prints.in_range("0.16.1")
    assert prints.in_range("0.16.0rc3")
    assert not prints.in_range("0.17.0rc0")
    assert not prints.in_range("unknown")


def test_a_version_between_two_records_may_have_the_signature_of_either(lab):
    records = [
        prints.Fingerprint("0.14.0", {"m:f": ("def(a)",)}),
        prints.Fingerprint("0.16.1", {"m:f": ("def(a, b)",)}),
    ]
    patch = lab.patch("m:f")
    assert prints.expected_facts(patch, "0.14.0", records) == [("def(a)",)]
    assert prints.expected_facts(patch, "0.15.0", records) == [("def(a)",), ("def(a, b)",)]
    late = lab.patch("m:f", versions=">=0.16,<0.17")
    assert prints.expected_facts(late, "0.16.0", records) == [("def(a, b)",)]
    assert prints.expected_facts(lab.patch("m:g"), "0.16.0", records) == []


@pytest.mark.parametrize("version", ["0.14.0", "0.15.3", "0.16.1"])
def test_every_target_of_the_table_is_recorded(version):
    """Fails after a new patch: run `mindspeed fingerprint --from <wheel> --from <checkout>`."""
    (record,) = (r for r in prints.recorded() if r.version == version)
    patches = [patch for feature in load_features() for patch in feature.patches]
    wanted = {p.target for p in patches if prints.in_range(version, p.versions)}
    assert set(record.targets) == wanted
    kinds = {p.target: p.kind for p in patches}
    assert all(facts or kinds[target] == "add" for target, facts in record.targets.items())


@needs_megatron
def test_the_record_of_the_installed_version_can_be_made_again():
    version = MEGATRON.version
    patches = [patch for feature in load_features() for patch in feature.patches]
    made = prints.make_record([MEGATRON], version, patches)
    (record,) = (r for r in prints.recorded() if r.version == version)
    assert made["targets"]
    for target, found in made["targets"].items():
        assert record.targets[target] == tuple(found)


@pytest.fixture
def wheel(tmp_path):
    path = tmp_path / "megatron_core-0.16.9-py3-none-any.whl"
    info = "MAJOR = 0\nMINOR = 16\nPATCH = 9\nPRE_RELEASE = ''\n"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("megatron/core/package_info.py", info)
        file.writestr("megatron/core/tensor_parallel/mappings.py",
                      "def _gather_along_first_dim(x): pass")  # fmt: skip
    return path


def test_the_command_reads_wheels(wheel, tmp_path, capsys):
    assert main(["fingerprint", "--from", str(wheel), "--out", str(tmp_path)]) == 0
    assert "megatron-core 0.16.9" in capsys.readouterr().out
    (record,) = prints.recorded(tmp_path)
    assert record.targets[TARGET] == ("def(x)",)
    assert record.targets["megatron.core.utils:is_te_min_version"] == ()


def test_the_command_refuses_what_is_not_megatron(tmp_path, capsys):
    assert main(["fingerprint", "--from", str(tmp_path)]) == 2
    assert "no megatron/ package there" in capsys.readouterr().err


def test_sources_of_two_versions_do_not_mix(wheel, tmp_path, capsys):
    other = tmp_path / "other" / "megatron" / "core"
    other.mkdir(parents=True)
    (other / "package_info.py").write_text("MAJOR = 0\nMINOR = 14\nPATCH = 0\n")
    sources = ["--from", str(wheel), "--from", str(tmp_path / "other")]
    assert main(["fingerprint", *sources]) == 2
    assert "of one version" in capsys.readouterr().err


def test_a_place_without_source_is_refused(tmp_path):
    with pytest.raises(SourceError, match="wheel or a folder"):
        open_source(tmp_path)
