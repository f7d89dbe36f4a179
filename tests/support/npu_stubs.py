"""torch_npu on a machine without Ascend's libraries: empty stand-ins for what it links to.

The stand-ins are generated from the installed wheel: every symbol that its libraries leave
undefined becomes a function that returns 0, but for the few in `ANSWERS`. With them torch_npu
imports, its operators are registered with their schemas and shape functions, and tensors on device
"npu" exist under FakeTensorMode. Nothing can run. Needs binutils and a C compiler.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import subprocess
from pathlib import Path

# What torch_npu asks before it makes a device current and gives it a stream, which autograd wants
# also where tensors hold no data: one device, number 0, of one kind.
ANSWERS = {
    "aclrtGetDeviceCount": "int {name}(unsigned *count) { *count = 1; return 0; }",
    "aclrtGetDevice": "int {name}(int *device) { *device = 0; return 0; }",
    "aclrtCreateStreamWithConfig": "int {name}(void **s) { *s = &s; return 0; }",
    "aclGetCompileoptSize": "unsigned long {name}(void) { return 16; }",
    "aclGetCompileopt": "int {name}(int o, char *v) { v[0] = '0'; v[1] = 0; return 0; }",
    "aclrtGetSocName": 'const char *{name}(void) { return "Ascend910B1"; }',
}
# Made by the compiler or found in every process.
NOT_THEIRS = {"_ITM_deregisterTMCloneTable", "_ITM_registerTMCloneTable", "__gmon_start__"}


def installed() -> bool:
    """Say whether the torch_npu wheel is here, without importing it."""
    return importlib.util.find_spec("torch_npu") is not None


def import_torch_npu(folder: Path) -> None:
    """Build the stand-ins in a folder, load them, and import torch_npu."""
    os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
    for library in build(folder):
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    import torch_npu  # noqa: F401


def build(folder: Path) -> list[Path]:
    """Compile the stand-ins; return the libraries, named as torch_npu asks for them."""
    ours, theirs = _libraries()
    missing = _symbols(ours, "--undefined-only") - _symbols([*ours, *theirs], "--defined-only")
    missing = {s for s in missing - NOT_THEIRS if not s.startswith(("Py", "_Py", "__cxa"))}
    missing |= ANSWERS.keys() | _looked_up(ours)
    source = folder / "stubs.c"
    lines = (_function(i, symbol) for i, symbol in enumerate(sorted(missing)))
    source.write_text("".join(lines), encoding="utf-8")
    return [_compile(source, folder / name) for name in _wanted(ours, theirs)]


def _function(number: int, symbol: str) -> str:
    if symbol in ANSWERS:
        return ANSWERS[symbol].replace("{name}", symbol) + "\n"
    declared = f'long stub{number}(void) __asm__("{symbol}");'
    return f"{declared} long stub{number}(void) {{ return 0; }}\n"


def _libraries() -> tuple[list[Path], list[Path]]:
    """Return torch_npu's own libraries and those that it may use: torch's and the bundled ones."""
    places = {}
    for name in ("torch", "torch_npu"):
        spec = importlib.util.find_spec(name)
        assert spec is not None, f"{name} is not installed"
        assert spec.origin is not None
        places[name] = Path(spec.origin).parent
    package = places["torch_npu"]
    ours = [*sorted((package / "lib").glob("*.so")), *sorted(package.glob("_C*.so"))]
    bundled = sorted((package.parent / "torch_npu.libs").glob("*.so*"))
    return ours, [*bundled, *sorted((places["torch"] / "lib").glob("*.so*"))]


def _symbols(libraries: list[Path], which: str) -> set[str]:
    """Return dynamic symbols; undefined ones without those of a versioned library (libc)."""
    lines = _output("nm", "-D", which, *map(str, libraries)).splitlines()
    names = {line.split()[-1] for line in lines if line.strip() and not line.endswith(":")}
    if which == "--undefined-only":
        return {name for name in names if "@" not in name}
    return {name.split("@")[0] for name in names}


def _looked_up(libraries: list[Path]) -> set[str]:
    """Return names of the runtime's functions that are looked up while running: as text."""
    text = b"".join(path.read_bytes() for path in libraries if path.name == "libtorch_npu.so")
    return {name.decode() for name in re.findall(rb"\0(acl(?!nn)[A-Za-z0-9]+)(?=\0)", text)}


def _wanted(ours: list[Path], theirs: list[Path]) -> list[str]:
    """Return the names of libraries that torch_npu asks for and that are not on this machine."""
    asked = set()
    for line in _output("readelf", "-d", *map(str, ours)).splitlines():
        if "(NEEDED)" in line:
            asked.add(line.split("[")[1].rstrip("]"))
    here = {path.name for path in (*ours, *theirs)}
    return sorted(name for name in asked - here if not _loads(name))


def _loads(name: str) -> bool:
    try:
        ctypes.CDLL(name)
    except OSError:
        return False
    return True


def _compile(source: Path, library: Path) -> Path:
    soname = f"-Wl,-soname,{library.name}"
    subprocess.run(["cc", "-shared", "-fPIC", soname, "-o", library, source], check=True)
    return library


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
