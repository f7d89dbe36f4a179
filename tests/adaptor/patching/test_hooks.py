"""The import hook: right after execution, once, with the loader otherwise unchanged."""

import importlib
import importlib.resources
import sys
import zipfile
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader

import pytest

from mindspeed.patching.hooks import ImportHooks


@pytest.fixture
def hooks():
    made = ImportHooks()
    yield made
    if made in sys.meta_path:
        sys.meta_path.remove(made)


def test_it_fires_once_right_after_execution_and_then_leaves(lab, hooks):
    lab.write("victim", "value = 1\nfrom values import seen\nstarted = list(seen)")
    lab.write("values", "seen = []")
    finders = list(sys.meta_path)
    fired = []
    hooks.add("victim", lambda module: fired.append((module.__name__, module.value)))
    assert sys.meta_path == [hooks, *finders]
    import victim

    assert fired == [("victim", 1)]
    assert sys.meta_path == finders
    importlib.reload(victim)
    assert len(fired) == 1


def test_the_loader_keeps_everything_and_its_exec_module(lab, hooks):
    lab.write("victim", "'''Doc.'''\nvalue = 1")
    (lab.folder / "victim.txt").write_text("data")
    hooks.add("victim", lambda module: None)
    import victim

    loader = victim.__spec__.loader
    assert type(loader) is SourceFileLoader
    assert vars(loader) == {"name": "victim", "path": str(lab.folder / "victim.py")}
    assert loader.get_source("victim").startswith("'''Doc.'''")
    assert loader.get_code("victim") is not None
    assert not loader.is_package("victim")
    assert loader.get_resource_reader("victim") is not None


def test_packages_submodules_and_zip_files(lab, hooks):
    archive = lab.folder / "packed.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("victim/__init__.py", "value = 1")
        file.writestr("victim/one.py", "from victim import two\nvalue = 2")
        file.writestr("victim/two.py", "value = 3")
    sys.path.insert(0, str(archive))
    fired = []
    try:
        for name in ("victim", "victim.one", "victim.two"):
            hooks.add(name, lambda module: fired.append(module.__name__))
        one = lab.load("victim.one")
    finally:
        sys.path.remove(str(archive))
    assert fired == ["victim", "victim.two", "victim.one"]
    assert one.__spec__.loader.get_source("victim.one").endswith("value = 2")


class Rewriter:
    """A finder like the device layer's: finds through those behind it, swaps the loader."""

    class Loader(SourceFileLoader):
        def exec_module(self, module):
            module.rewritten = True
            super().exec_module(module)

    def find_spec(self, name, path, target=None):
        if not name.startswith("victim"):
            return None
        behind = sys.meta_path[sys.meta_path.index(self) + 1 :]
        spec = next(filter(None, (f.find_spec(name, path, target) for f in behind)), None)
        if spec is not None:
            spec.loader = self.Loader(name, spec.loader.path)
        return spec


@pytest.mark.parametrize("rewriter_first", [True, False])
def test_it_works_with_a_finder_that_swaps_loaders(lab, hooks, rewriter_first):
    lab.write("victim", "value = 1")
    rewriter = Rewriter()
    seen = []
    if not rewriter_first:
        hooks.add("victim", lambda module: seen.append(module.rewritten))
    sys.meta_path.insert(sys.meta_path.index(PathFinder), rewriter)
    if rewriter_first:
        hooks.add("victim", lambda module: seen.append(module.rewritten))
    try:
        import victim
    finally:
        sys.meta_path.remove(rewriter)
    assert seen == [True]
    assert type(victim.__spec__.loader) is Rewriter.Loader


def test_a_finder_that_asks_everybody_again_does_not_loop(lab, hooks):
    lab.write("victim", "value = 1")

    class Echo:
        def find_spec(self, name, path, target=None):
            others = [finder for finder in sys.meta_path if finder is not self]
            found = (finder.find_spec(name, path, target) for finder in others)
            return next(filter(None, found), None)

    fired = []
    sys.meta_path.insert(0, echo := Echo())
    try:
        hooks.add("victim", fired.append)
        victim = lab.load("victim")
    finally:
        sys.meta_path.remove(echo)
    assert fired == [victim]


def test_a_loader_whose_attributes_are_fixed(lab, hooks):
    class Fixed:
        __slots__ = ()
        extra = "kept"

        def create_module(self, spec):
            return None

        def exec_module(self, module):
            module.value = 1

    class Finder:
        def find_spec(self, name, path, target=None):
            return ModuleSpec(name, Fixed()) if name == "victim" else None

    fired = []
    sys.meta_path.insert(0, finder := Finder())
    try:
        hooks.add("victim", lambda module: fired.append(module.value))
        victim = lab.load("victim")
    finally:
        sys.meta_path.remove(finder)
    assert fired == [1]
    assert victim.__spec__.loader.extra == "kept"


def test_a_failing_import_keeps_the_hook_for_the_next_try(lab, hooks):
    lab.write("victim", "raise ImportError('not yet')")
    fired = []
    hooks.add("victim", fired.append)
    with pytest.raises(ImportError, match="not yet"):
        lab.load("victim")
    assert fired == []
    assert hooks.pending == ("victim",)
    lab.write("victim", "value = 1  # and a longer file than before")
    victim = lab.load("victim")
    assert fired == [victim]


def test_a_failing_callback_fails_the_import_every_time(lab, hooks):
    lab.write("victim", "value = 1")

    def refuse(module):
        raise ValueError("does not fit")

    hooks.add("victim", refuse)
    for _ in range(2):
        with pytest.raises(ValueError, match="does not fit"):
            lab.load("victim")
        assert "victim" not in sys.modules
    hooks.discard("victim", refuse)
    assert lab.load("victim").value == 1
    assert hooks not in sys.meta_path


def test_a_module_that_is_not_there_stays_not_there(hooks):
    hooks.add("victim.nowhere", lambda module: None)
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("victim.nowhere")


def test_pending_modules_can_be_looked_for_without_being_imported(lab, hooks):
    lab.write("victim", "raise AssertionError('must not run')")
    hooks.add("victim", lambda module: None)
    assert importlib.util.find_spec("victim").origin == str(lab.folder / "victim.py")
    assert hooks.pending == ("victim",)
