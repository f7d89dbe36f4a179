"""Files of a result: made new, never overwritten, readable by the owner and the group only.

    folder = make_folder("profile_dir")
    write_new(folder, "rank0.flops.json", text)      # rank0.flops.json
    write_new(folder, "rank0.flops.json", text)      # rank0.flops.1.json: the first one stays

Folders get mode 0750 and files 0640, and less where the umask takes away more. What existed before
keeps its mode. A name is a plain name, so nothing is written outside its folder.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

__all__ = [
    "DIRECTORY_MODE",
    "FILE_MODE",
    "adopt",
    "check_writable",
    "free_number",
    "make_folder",
    "numbered",
    "workspace",
    "write_new",
]

DIRECTORY_MODE = 0o750
FILE_MODE = 0o640

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0)
_TRIES = 10_000  # results of one name; more of them is a loop gone wrong


def make_folder(path: str | os.PathLike[str]) -> Path:
    """Make a folder and its missing parents; one that exists is taken as it is.

    Returns:
        Its absolute path, so that a later change of the working directory does not matter.

    Raises:
        ValueError: it cannot be made or is not a folder; says why.
    """
    folder = Path(path).absolute()
    try:
        for missing in reversed([p for p in (folder, *folder.parents) if not p.exists()]):
            # Another rank may make the same folder at the same time.
            missing.mkdir(mode=DIRECTORY_MODE, exist_ok=True)
    except OSError as error:
        raise ValueError(f"the folder {folder} cannot be made: {error.strerror}") from error
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder: name another one")
    return folder


def check_writable(folder: Path) -> None:
    """Find out now whether files can be made in a folder, and leave none.

    Raises:
        ValueError: they cannot; says why.
    """
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"nothing can be written to {folder}: {error.strerror}") from error


def numbered(name: str, number: int) -> str:
    """`rank0.flops.json` with number 2 is `rank0.flops.2.json`; number 0 changes nothing."""
    if number == 0:
        return name
    stem, endings = _split(name)
    return f"{stem}.{number}{endings}"


def free_number(folder: Path, *names: str) -> int:
    """The lowest number with which none of the names is taken."""
    for number in range(_TRIES):
        if not any(os.path.lexists(folder / numbered(_checked(n), number)) for n in names):
            return number
    raise FileExistsError(f"{folder} holds {_TRIES} results of the name {names[0]}")


def write_new(folder: Path, name: str, content: str | bytes, number: int = 0) -> Path:
    """Write a file that did not exist; if the name is taken, under the next number.

    Args:
        folder: where; it exists.
        name: a plain file name.
        content: all of it; text is written as UTF-8.
        number: the first number to try.

    Returns:
        The path that was written. A file that could not be written whole is removed again.

    Raises:
        ValueError: the name is not a plain file name.
        OSError: the disk is full, the folder has gone, and the like.
    """
    data = content.encode() if isinstance(content, str) else content
    for path in _candidates(folder, name, number):
        with contextlib.suppress(FileExistsError):
            handle = os.open(path, _NEW, FILE_MODE)
            try:
                with os.fdopen(handle, "wb") as file:
                    file.write(data)
            except BaseException:
                path.unlink()
                raise
            return path
    raise FileExistsError(f"{folder} holds {_TRIES} results of the name {name}")


def adopt(source: Path, folder: Path, name: str, number: int = 0) -> Path:
    """Move a finished file into a folder of the same file system, under a name that is free.

    Args:
        source: the file; gone afterwards.
        folder: where to; it exists.
        name: a plain file name.
        number: the first number to try.

    Returns:
        The path it has now.

    Raises:
        ValueError: the name is not a plain file name.
        OSError: the file system says no.
    """
    source.chmod(stat.S_IMODE(source.stat().st_mode) & FILE_MODE)
    for path in _candidates(folder, name, number):
        try:
            # A link fails where the name is taken; a rename would overwrite.
            os.link(source, path)
        except FileExistsError:
            continue
        except OSError:
            path = write_new(folder, name, source.read_bytes(), number)
        source.unlink()
        return path
    raise FileExistsError(f"{folder} holds {_TRIES} results of the name {name}")


@contextlib.contextmanager
def workspace(folder: Path) -> Iterator[Path]:
    """A private folder inside `folder` for unfinished files; removed with what is left in it."""
    place = Path(tempfile.mkdtemp(prefix=".unfinished-", dir=folder))
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _candidates(folder: Path, name: str, number: int) -> Iterator[Path]:
    _checked(name)
    yield from (folder / numbered(name, n) for n in range(number, number + _TRIES))


def _checked(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise ValueError(f"a file name has letters, digits and . _ + - only, got {name!r}")
    return name


# Endings that viewers know as a whole; the number goes before them.
_ENDINGS = (".pt.trace.json.gz", ".pt.trace.json", ".summary.json")


def _split(name: str) -> tuple[str, str]:
    for ending in _ENDINGS:
        if name.endswith(ending):
            return name[: -len(ending)], ending
    stem, dot, ending = name.rpartition(".")
    return (stem, dot + ending) if dot else (name, "")
