"""The import hook that runs ``megatron.*`` from rewritten source.

Python's own source loader does the work: reading, validating and writing the bytecode cache. This
module gives it other source (the rewritten tree) and another cache name (an ``opt-`` tag of its
own beside Python's file in ``__pycache__``). Where Python cannot write a cache, there is none.
"""

from __future__ import annotations

import importlib.machinery
import sys
from collections import Counter
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType

from mindspeed.device.lookup import Lookup
from mindspeed.device.rewrite import NAME, VERSION, needs_rewrite, rewrite

_TAG = f".opt-mindspeed{VERSION}"


class RewritingLoader(SourceFileLoader):
    """Loads one ``megatron`` source file with its CUDA places turned into look-ups."""

    def __init__(self, fullname: str, path: str, lookup: Lookup) -> None:
        super().__init__(fullname, path)
        self.lookup = lookup

    def exec_module(self, module: ModuleType) -> None:
        """Bind the look-up object, then run the module."""
        vars(module)[NAME] = self.lookup.for_module(self.name)
        super().exec_module(module)

    def source_to_code(  # type: ignore[override]
        self, data: bytes, path: str = "<megatron>", *, _optimize: int = -1
    ) -> CodeType:
        """Compile the rewritten tree under the original file name."""
        tree, _ = rewrite(data, str(path))
        return compile(tree, path, "exec", dont_inherit=True, optimize=_optimize)

    def get_data(self, path: str) -> bytes:
        """Read source as it is and bytecode from the tagged file."""
        return super().get_data(_tagged(str(path)))

    def set_data(self, path: str, data: bytes, *, _mode: int = 0o666) -> None:  # type: ignore[override]
        """Write bytecode to the tagged file; silently nothing where Python may not write."""
        super().set_data(_tagged(str(path)), data, _mode=_mode)


class MegatronFinder(MetaPathFinder):
    """Finds ``megatron.*`` through the finders behind it and swaps the loader of source files."""

    def __init__(self, lookup: Lookup) -> None:
        self.lookup = lookup

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the spec with a rewriting loader, or None to leave the module to others."""
        if not fullname.startswith("megatron."):
            return None
        spec = self._find_behind(fullname, path, target)
        if spec is None or type(spec.loader) is not SourceFileLoader:
            return spec
        if needs_rewrite(Path(spec.loader.path).read_bytes()):
            spec.loader = RewritingLoader(fullname, spec.loader.path, self.lookup)
        return spec

    def _find_behind(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None
    ) -> ModuleSpec | None:
        behind = sys.meta_path[sys.meta_path.index(self) + 1 :]
        found = (finder.find_spec(fullname, path, target) for finder in behind)
        return next((spec for spec in found if spec is not None), None)


def install_finder(lookup: Lookup) -> MegatronFinder:
    """Put the finder right before Python's path finder, so that outer hooks see its loader."""
    finder = MegatronFinder(lookup)
    at = next((i for i, f in enumerate(sys.meta_path) if f is PathFinder), len(sys.meta_path))
    sys.meta_path.insert(at, finder)
    return finder


def loaded_unrewritten() -> list[str]:
    """Names of loaded ``megatron`` source modules that hold places but not the look-up object."""
    return sorted(
        name
        for name, module in list(sys.modules.items())
        if name.startswith("megatron.")
        and NAME not in vars(module)
        and isinstance(getattr(module.__spec__, "loader", None), SourceFileLoader)
        and needs_rewrite(Path(module.__spec__.origin).read_bytes())  # type: ignore
    )


def rewritten_modules() -> dict[str, Counter[str]]:
    """Loaded rewritten modules with the number of places by kind (parses each file again)."""
    return {
        name: rewrite(Path(str(module.__file__)).read_bytes())[1]
        for name, module in sorted(sys.modules.items())
        if name.startswith("megatron.") and NAME in vars(module)
    }


def _tagged(path: str) -> str:
    """``x.cpython-311.pyc`` to ``x.cpython-311.opt-mindspeed1.pyc``; other paths unchanged."""
    if not path.endswith(tuple(importlib.machinery.BYTECODE_SUFFIXES)):
        return path
    stem, dot, suffix = path.rpartition(".")
    return f"{stem}{_TAG}{dot}{suffix}"
