"""Read JSON that somebody else may have written: bounded in size, time and memory.

A trace is read event by event, so that memory does not grow with the file. Links are not followed,
devices and pipes are not opened, and nothing inside a file names another file.
"""

from __future__ import annotations

import codecs
import errno
import gzip
import json
import math
import os
import re
import stat
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, cast

CHUNK = 1 << 20
_SPACE = re.compile(r"[ \t\n\r]*")
VALUE_CHARACTERS = 1 << 24  # of one event, or of one entry of the header


class TraceError(ValueError):
    """A file of a profile cannot be used.

    Attributes:
        path: The file.
        fault: What is wrong with it.
    """

    def __init__(self, path: str | os.PathLike[str], fault: str) -> None:
        super().__init__(f"{printable(os.fspath(path))}: {printable(fault)}")
        self.path = Path(path)
        self.fault = fault


@dataclass(frozen=True)
class Limits:
    """How much is read of one file before it is refused.

    Attributes:
        trace_bytes: Of a trace, both as it lies on disk and unpacked.
        record_bytes: Of a summary, a meter's record or a table, which are held in memory whole.
        trace_events: Of a trace; a usual event has 200 bytes, so that this is seldom reached first.
    """

    trace_bytes: int = 1 << 30
    record_bytes: int = 1 << 27
    trace_events: int = 1 << 24

    def __post_init__(self) -> None:
        if min(self.trace_bytes, self.record_bytes, self.trace_events) <= 0:
            raise ValueError(f"limits must be positive, got {self}")


def printable(text: str, length: int = 200) -> str:
    """Text fit for a terminal: control characters escaped, shortened in the middle."""
    if len(text) > 2 * length:
        text = f"{text[:length]}...{text[-length:]}"
    # A lone surrogate is not printable either, and no terminal could encode it.
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    if len(text) <= length:
        return text
    half = (length - 3) // 2
    return f"{text[:half]}...{text[-half:]}"


def _open(path: Path) -> BufferedReader:
    # Without O_NONBLOCK, opening a pipe would wait for a writer.
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        descriptor = os.open(path, flags)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise TraceError(path, "is a symbolic link, which is not followed") from None
        raise TraceError(path, f"cannot be opened: {error.strerror}") from None
    except ValueError as error:
        raise TraceError(path, f"cannot be opened: {error}") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise TraceError(path, "is not a regular file")
    return os.fdopen(descriptor, "rb")


def _too_large(path: Path, limit: int) -> TraceError:
    return TraceError(path, f"is larger than the limit of {limit} bytes; a higher one can be set")


def read_chunks(path: Path, limit: int) -> Iterator[bytes]:
    """The content of a file, unpacked if its name ends in .gz, in pieces of at most 1 MiB.

    Raises:
        TraceError: The file cannot be opened, is no regular file, is larger than `limit` on disk or
            unpacked, or is damaged.
    """
    with _open(path) as file:
        if os.fstat(file.fileno()).st_size > limit:
            raise _too_large(path, limit)
        packed = path.name.endswith(".gz")
        source: BinaryIO = cast(BinaryIO, gzip.GzipFile(fileobj=file)) if packed else file
        total = 0
        while True:
            try:
                chunk = source.read(CHUNK)
            except EOFError:
                raise TraceError(path, "is cut: the compressed data end too early") from None
            except (OSError, zlib.error) as error:
                raise TraceError(path, f"is damaged: {error}") from None
            if not chunk:
                return
            total += len(chunk)
            if total > limit:
                raise _too_large(path, limit)
            yield chunk


def _constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number of JSON")


class JsonStream:
    """JSON text of a file, taken value by value."""

    def __init__(self, path: Path, limit: int) -> None:
        self.path = path
        self._chunks = read_chunks(path, limit)
        self._utf8 = codecs.getincrementaldecoder("utf-8-sig")()
        self._decode = json.JSONDecoder(parse_constant=_constant).raw_decode
        self._text, self._at, self._before = "", 0, 0
        self._ended = False

    def _more(self) -> bool:
        """Appends the next piece of the file; False at its end."""
        while not self._ended:
            chunk = next(self._chunks, b"")
            self._ended = not chunk
            try:
                text = self._utf8.decode(chunk, final=self._ended)
            except UnicodeDecodeError as error:
                fault = "is cut inside a character" if self._ended else f"is not UTF-8: {error}"
                raise TraceError(self.path, fault) from None
            if text:
                self._before += self._at
                self._text, self._at = self._text[self._at :] + text, 0
                return True
        return False

    def peek(self) -> str:
        """The next character that is not white space, left where it is; "" at the end."""
        while True:
            self._at = _SPACE.match(self._text, self._at).end()  # type: ignore[union-attr]
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                return ""

    def take(self, wanted: str) -> str:
        """Steps over the next character, which must be one of `wanted`."""
        found = self.peek()
        if not found:
            raise TraceError(self.path, "is cut: it ends inside the JSON, or is empty")
        if found not in wanted:
            expected = " or ".join(repr(c) for c in wanted)
            raise TraceError(
                self.path,
                f"is not JSON: character {self._before + self._at} is {found!r}, not {expected}",
            )
        self._at += 1
        return found

    def value(self) -> Any:
        """The next whole value."""
        self.peek()
        while True:
            try:
                value, end = self._decode(self._text, self._at)
            except json.JSONDecodeError as error:
                if len(self._text) - self._at > VALUE_CHARACTERS or not self._more():
                    raise self._broken(error) from None
            except RecursionError:
                raise TraceError(self.path, "is nested too deeply") from None
            except ValueError as error:
                raise TraceError(self.path, f"is not JSON: {error}") from None
            else:
                # A number may go on in the next piece, at most after an exponent and its sign.
                if end + 3 <= len(self._text) or not isinstance(value, (int, float)):
                    self._at = end
                    return value
                if not self._more():
                    self._at = end
                    return value

    def _broken(self, error: json.JSONDecodeError) -> TraceError:
        at_end = error.pos >= len(self._text) or error.msg.startswith("Unterminated")
        if self._ended and at_end:
            return TraceError(self.path, "is cut: it ends inside the JSON, or is empty")
        place = self._before + error.pos
        return TraceError(self.path, f"is not JSON: {error.msg} at character {place}")

    def items(self) -> Iterator[Any]:
        """The elements of the list that comes next."""
        self.take("[")
        if self.peek() == "]":
            self.take("]")
            return
        while True:
            yield self.value()
            if self.take(",]") == "]":
                return

    def keys(self) -> Iterator[str]:
        """The keys of the object that comes next; the caller takes the value after each."""
        self.take("{")
        if self.peek() == "}":
            self.take("}")
            return
        while True:
            if self.peek() != '"':
                self.take('"')
            yield self.value()
            if self.take(",}") == "}":
                return

    def close(self) -> None:
        """Checks that nothing but white space is left."""
        if self.peek():
            raise TraceError(self.path, "is not JSON: more follows after its end")


class TraceEvents:
    """The events of a trace in Chrome's format, one at a time.

    Both forms are read: an object with `traceEvents`, and a bare list.

    Attributes:
        header: The other entries of the object; complete once all events are read.
    """

    def __init__(self, path: Path, limit: int) -> None:
        self.path = path
        self.header: dict[str, Any] = {}
        self._stream = JsonStream(path, limit)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if self._stream.peek() == "[":
            yield from self._events()
        else:
            yield from self._object()
        self._stream.close()

    def _object(self) -> Iterator[dict[str, Any]]:
        found = False
        for key in self._stream.keys():  # noqa: SIM118 (not a mapping)
            self._stream.take(":")
            if key != "traceEvents":
                self.header[key] = self._stream.value()
                continue
            if found:
                raise TraceError(self.path, "is not a trace: traceEvents occurs twice")
            found = True
            yield from self._events()
        if not found:
            raise TraceError(self.path, "is not a trace: it has no traceEvents")

    def _events(self) -> Iterator[dict[str, Any]]:
        if self._stream.peek() != "[":
            raise TraceError(self.path, "is not a trace: traceEvents is not a list")
        for index, event in enumerate(self._stream.items()):
            if not isinstance(event, dict):
                kind = type(event).__name__
                raise TraceError(self.path, f"is not a trace: event {index} is a {kind}")
            yield event


def load_record(path: Path, limit: int) -> dict[str, Any]:
    """A small JSON file that holds one object.

    Raises:
        TraceError: See `read_chunks`; also if it is not JSON, or not an object.
    """
    content = b"".join(read_chunks(path, limit))
    try:
        value = json.loads(content.decode("utf-8-sig"), parse_constant=_constant)
    except UnicodeDecodeError as error:
        raise TraceError(path, f"is not UTF-8: {error}") from None
    except RecursionError:
        raise TraceError(path, "is nested too deeply") from None
    except ValueError as error:
        cut = isinstance(error, json.JSONDecodeError) and error.pos >= len(error.doc.rstrip())
        fault = "is cut: it ends inside the JSON, or is empty" if cut else f"is not JSON: {error}"
        raise TraceError(path, fault) from None
    if not isinstance(value, dict):
        raise TraceError(path, f"holds a {type(value).__name__} where an object is needed")
    return value


def number(value: object, what: str, *, low: float = 0, high: float = 1e18) -> float:
    """A finite number within bounds.

    Raises:
        ValueError: It is none; the message names `what`.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{what} is a {type(value).__name__}, not a number")
    if not low <= value <= high or math.isnan(value):
        shown = value if isinstance(value, float) or abs(value) < 10**30 else "a huge integer"
        raise ValueError(f"{what} is {shown}, outside {low:g} to {high:g}")
    return value


def integer(value: object, what: str, *, low: int = 0, high: int = 1 << 62) -> int:
    """An integer within bounds.

    Raises:
        ValueError: It is none; the message names `what`.
    """
    found = number(value, what, low=low, high=high)
    if not isinstance(found, int):
        raise ValueError(f"{what} is {found}, not an integer")
    return found
