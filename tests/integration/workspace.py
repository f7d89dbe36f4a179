"""What the integration tests know about the workspace: its packages, and how to run a snippet."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Package:
    """One distribution of the workspace."""

    name: str
    folder: str
    module: str
    extras: tuple[str, ...] = ()
    siblings: tuple[str, ...] = ()  # distributions of ours that it cannot do without

    @property
    def path(self) -> Path:
        return ROOT / "packages" / self.folder

    @property
    def sources(self) -> list[Path]:
        return sorted((self.path / "src" / self.module).rglob("*.py"))


PACKAGES = (
    Package("ms-memory", "ms-memory", "ms_memory", ("report",), ("ms-ops",)),
    Package("ms-ops", "ms-ops", "ms_ops", ("triton",)),
    Package("ms-parallel", "ms-parallel", "ms_parallel", siblings=("ms-ops",)),
    Package("ms-profile", "ms-profile", "ms_profile", ("report",)),
    Package("mindspeed", "ms-adaptor", "mindspeed", ("l1", "l2", "profile", "train", "all")),
)
LIBRARIES = tuple(package for package in PACKAGES if package.name != "mindspeed")


def run_python(
    code: str, *args: str, python: str | Path = sys.executable, isolated: bool = False, **env: str
) -> str:
    """Run a snippet in a fresh interpreter; returns what it printed, fails with its errors."""
    command = [str(python), *(["-I"] if isolated else []), "-c", code, *args]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, **env}
    )
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout
