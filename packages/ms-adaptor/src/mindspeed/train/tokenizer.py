"""Text to token numbers: bytes by default, or a Hugging Face `tokenizers` file.

Both answer what Megatron's datasets ask of a tokenizer: `vocab_size`, `eod`, `unique_identifiers`.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Protocol

_END_NAMES = ("<|endoftext|>", "</s>", "<eos>", "<|eos|>", "[SEP]", "<eod>")


class TokenizerError(ValueError):
    """A tokenizer that cannot be used, and what to do."""


class Tokenizer(Protocol):
    """What the data pipeline needs."""

    vocab_size: int
    eod: int
    unique_identifiers: dict[str, Any]

    def encode(self, text: str) -> list[int]:
        """The token numbers of `text`, without an end mark."""
        ...


class ByteTokenizer:
    """The UTF-8 bytes are the tokens 0 to 255; 256 ends a document."""

    def __init__(self) -> None:
        self.vocab_size = 257
        self.eod = 256
        self.unique_identifiers: dict[str, Any] = {"class": "ByteTokenizer"}

    def encode(self, text: str) -> list[int]:
        """The bytes of `text`."""
        return list(text.encode())


class FileTokenizer:
    """A `tokenizer.json` of the Hugging Face tokenizers library.

    Args:
        path: the file.

    Raises:
        TokenizerError: the library is missing, the file is not readable, or it names no token that
            ends a document.
    """

    def __init__(self, path: Path) -> None:
        try:
            from tokenizers import Tokenizer as Library
        except ImportError as error:
            raise TokenizerError(
                "--tokenizer needs the package tokenizers: pip install tokenizers, "
                "or leave the option out to train on bytes"
            ) from error
        if not path.is_file():
            raise TokenizerError(f"--tokenizer {path}: no such file")
        try:
            self._library = Library.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise TokenizerError(f"--tokenizer {path}: not a tokenizers file: {error}") from error
        ends = [self._library.token_to_id(name) for name in _END_NAMES]
        known = [number for number in ends if number is not None]
        if not known:
            raise TokenizerError(
                f"--tokenizer {path}: has none of the end marks {', '.join(_END_NAMES)}"
            )
        self.eod = known[0]
        self.vocab_size = self._library.get_vocab_size()
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        self.unique_identifiers: dict[str, Any] = {"class": "FileTokenizer", "sha256": digest}

    def encode(self, text: str) -> list[int]:
        """The token numbers of `text`."""
        numbers: list[int] = self._library.encode(text, add_special_tokens=False).ids
        return numbers


def load_tokenizer(path: str | None) -> Tokenizer:
    """The byte tokenizer, or the one of a file.

    Raises:
        TokenizerError: see `FileTokenizer`.
    """
    return ByteTokenizer() if path is None else FileTokenizer(Path(path))
