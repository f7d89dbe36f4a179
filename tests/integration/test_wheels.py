"""Every wheel, built from its own sdist, holds what it should and works with what it declares."""

from __future__ import annotations

import email
import json
import re
import subprocess
import sys
import tarfile
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from .workspace import PACKAGES, run_python

PIP = [sys.executable, "-m", "pip"]
ids = [package.name for package in PACKAGES]
each_package = pytest.mark.parametrize("package", PACKAGES, ids=ids)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Folder with one sdist and one wheel of every package, the wheel built from the sdist."""
    folder = tmp_path_factory.mktemp("dist")
    for package in PACKAGES:
        subprocess.run(
            [sys.executable, "-m", "build", "--no-isolation", "-o", folder, package.path],
            check=True,
            capture_output=True,
            text=True,
        )
    return folder


def the_wheel(built: Path, package) -> Path:
    (wheel,) = built.glob(
        f"{package.module if package.folder != 'ms-adaptor' else 'mindspeed'}-*.whl"
    )
    return wheel


def wheel_metadata(wheel: Path) -> email.message.Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [n for n in archive.namelist() if n.endswith(".dist-info/METADATA")]
        return email.message_from_bytes(archive.read(name))


@each_package
def test_files(built, package):
    with zipfile.ZipFile(the_wheel(built, package)) as archive:
        names = archive.namelist()
    tops = {name.split("/")[0] for name in names}
    assert len(tops) == 2  # the package and its dist-info: no tests, no docs, no sibling
    assert package.module in tops
    assert f"{package.module}/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    in_tree = {
        str(path.relative_to(package.path / "src"))
        for path in (package.path / "src" / package.module).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert in_tree == {name for name in names if name.startswith(f"{package.module}/")}


@each_package
def test_sdist(built, package):
    (sdist,) = built.glob(f"{package.name.replace('-', '_')}-*.tar.gz")
    with tarfile.open(sdist) as archive:
        tops = {"/".join(Path(name).parts[1:2]) for name in archive.getnames()}
    allowed = {"src", "README.md", "CHANGELOG.md", "LICENSE", "PKG-INFO", "pyproject.toml"}
    assert tops - {""} <= allowed | {".gitignore"}
    assert allowed <= tops


@each_package
def test_metadata(built, package):
    found = wheel_metadata(the_wheel(built, package))
    source = (package.path / "src" / package.module / "__init__.py").read_text()
    (version,) = re.findall(r'^__version__ = "(.+)"$', source, re.M)
    assert found["Name"] == package.name
    assert found["Version"] == version
    assert found["License-Expression"] == "MIT"
    assert found["Requires-Python"] == ">=3.10"
    assert set(found.get_all("Provides-Extra") or ()) == set(package.extras)
    assert len(found.get_payload()) > 400  # the README is the page of the package index
    assert version in (package.path / "CHANGELOG.md").read_text()


@each_package
def test_siblings_are_named_by_a_range_that_holds_their_version(built, package):
    versions = {p.name: wheel_metadata(the_wheel(built, p))["Version"] for p in PACKAGES}
    for text in wheel_metadata(the_wheel(built, package)).get_all("Requires-Dist") or ():
        requirement = Requirement(text)
        if requirement.name not in versions or requirement.name == package.name:
            continue
        assert {spec.operator for spec in requirement.specifier} == {">=", "<"}, text
        assert Version(versions[requirement.name]) in requirement.specifier, text


def test_base_dependencies_of_the_libraries_are_torch_and_siblings(built):
    for package in PACKAGES:
        found = wheel_metadata(the_wheel(built, package)).get_all("Requires-Dist") or ()
        base = {r.name for r in map(Requirement, found) if r.marker is None}
        if package.name == "mindspeed":
            assert "megatron-core" not in base
            assert not base & {p.name for p in PACKAGES}  # level 0 alone needs no sibling
        else:
            assert base == {"torch", *package.siblings}


def closure(names: set[str]) -> set[str]:
    """The installed distributions that `names` need, without extras."""
    found: set[str] = set()
    while names:
        name = names.pop()
        found.add(name)
        for text in metadata.requires(name) or ():
            requirement = Requirement(text)
            wanted = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
            key = requirement.name.lower()
            if wanted and key not in found:
                names.add(key)
    return found


def link_distributions(names: set[str], site: Path) -> None:
    """Make the installed distributions visible in another site-packages, and nothing else."""
    for name in names:
        distribution = metadata.distribution(name)
        tops = {Path(file).parts[0] for file in distribution.files or ()}
        for top in tops - {"..", "__pycache__"}:
            target = Path(str(distribution.locate_file(top)))
            if not (site / top).exists():
                (site / top).symlink_to(target)


IMPORT_ALL = """
import importlib, json, pkgutil, sys
package = importlib.import_module(sys.argv[1])
names = [m.name for m in pkgutil.walk_packages(package.__path__, package.__name__ + ".")]
skipped = tuple(sys.argv[2:])
for name in names:
    if not name.startswith(skipped):
        importlib.import_module(name)
print(json.dumps([package.__file__, package.__version__, sorted(sys.modules)]))
"""
# What names another library at import, and is itself imported once that is there: values of patches
# (Megatron, ms-ops), the old operator names (ms-ops), a backend (torch_npu).
GLUE = (
    "attention_alibi",
    "attention_module",
    "cross_entropy_function",
    "ema_model",
    "grouped_matmul_function",
    "moe_permute_function",
    "norm_module",
    "optimizer_builder",
    "provider",
    "rope_function",
    "softmax_function",
    "swiglu_function",
)
NEEDS_OTHERS = (
    "mindspeed.megatron_adaptor",
    "mindspeed.ops.",
    *(f"mindspeed.features.ops.{name}" for name in GLUE),
    *(f"mindspeed.features.context.{n}" for n in ("attention_module", "masks", "provider")),
    *(
        f"mindspeed.features.memory.{n}"
        for n in (
            "optim.builder",
            "optim.held",
            "optim.held_streamed",
            "optim.megatron",
            "planner.guard",
            "planner.schedule",
            "planner.stage",
            "planner.static",
            "planner.step",
            "recompute.layers",
            "swap.install",
            "swap.layers",
        )
    ),
    "ms_profile.profiler.npu",
)


@each_package
def test_alone_in_an_empty_environment(built, package, tmp_path):
    """Every module imports with only what the wheel declares, siblings included."""
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv" / "bin" / "python"
    wheel = the_wheel(built, package)
    subprocess.run(
        [*PIP, "--python", python, "install", "-q", "--no-deps", "--no-index", wheel],
        check=True,
        capture_output=True,
    )
    (site,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    declared = [Requirement(t) for t in wheel_metadata(wheel).get_all("Requires-Dist") or ()]
    base = {r.name.lower() for r in declared if r.marker is None}
    link_distributions(closure(base), site)
    file, version, modules = json.loads(
        run_python(IMPORT_ALL, package.module, *NEEDS_OTHERS, python=python, isolated=True)
    )
    assert Path(file).is_relative_to(site)
    assert version == wheel_metadata(wheel)["Version"]
    tops = {name.split(".")[0] for name in modules}
    assert not tops & {"megatron", "torch_npu", "triton"}
    allowed = {package.name, *package.siblings}
    assert not tops & {p.module for p in PACKAGES if p.name not in allowed}
