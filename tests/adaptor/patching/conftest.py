"""A laboratory: small packages on disk to patch, so that most tests need no Megatron."""

import importlib
import sys
import textwrap

import pytest

from mindspeed.patching.apply import active_handle, apply
from mindspeed.patching.plan import draft, plan
from mindspeed.patching.records import Feature, Patch
from mindspeed.patching.source import installed_source, installed_version

VERSION = installed_version(installed_source()) or "0.16.1"


class Lab:
    """Writes packages into a folder on `sys.path`, and builds records that patch them."""

    version = VERSION

    def __init__(self, folder):
        self.folder = folder

    def write(self, name, source=""):
        """Write the module `name` (dots make packages)."""
        *parents, leaf = name.split(".")
        place = self.folder.joinpath(*parents)
        place.mkdir(parents=True, exist_ok=True)
        for depth in range(1, len(parents) + 1):
            init = self.folder.joinpath(*parents[:depth], "__init__.py")
            init.touch()
        (place / f"{leaf}.py").write_text(textwrap.dedent(source))
        importlib.invalidate_caches()

    def load(self, name):
        return importlib.import_module(name)

    def patch(self, target, kind="replace", value="values:new", **fields):
        fields.setdefault("reason", "the test needs it")
        return Patch(target, kind, value, **fields)

    def feature(self, *patches, name="lab", level=0, **fields):
        return Feature(name, level, patches=patches, doc="a feature of the test", **fields)

    def plan(self, *features, config=None, draft_only=False, **options):
        options = {"level": 2, "device": "cpu", "megatron": VERSION, **options}
        return (draft if draft_only else plan)(config, features=features, **options)

    def apply(self, *patches, **options):
        return apply(self.plan(self.feature(*patches)), **options)


@pytest.fixture
def lab(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)
    yield Lab(tmp_path)
    handle = active_handle()
    if handle is not None:
        handle.undo()
    for name in set(sys.modules) - before:
        file = getattr(sys.modules[name], "__file__", None) or ""
        if file.startswith(str(tmp_path)) or name.split(".")[0] in {"victim", "values"}:
            del sys.modules[name]
