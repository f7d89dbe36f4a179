"""Reading text and dividing it into documents and splits, in an order that never changes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mindspeed.train.config import TrainConfig
from mindspeed.train.tokenizer import Tokenizer, load_tokenizer

# A plain text file is cut at blank lines into documents of about this many characters, so that
# held-out text can be taken from one file as well.
_DOCUMENT_CHARACTERS = 8192


class TextError(ValueError):
    """Text that is missing, empty, unreadable or too short to train on."""


@dataclass(frozen=True)
class Corpus:
    """Tokenized documents of both splits.

    Attributes:
        train: token numbers of each training document, end mark included.
        valid: the same for held-out documents.
        key: changes whenever the text, the tokenizer or the split does.
        source: where the text came from, for people.
    """

    train: tuple[tuple[int, ...], ...]
    valid: tuple[tuple[int, ...], ...]
    key: str
    source: str

    @property
    def train_tokens(self) -> int:
        """Tokens to train on in one epoch."""
        return sum(map(len, self.train))

    @property
    def valid_tokens(self) -> int:
        """Held-out tokens."""
        return sum(map(len, self.valid))


def builtin_documents() -> list[str]:
    """The topics of Python's own English reference, sorted by name."""
    from pydoc_data.topics import topics

    return [topics[name] for name in sorted(topics)]


def file_documents(path: Path) -> list[str]:
    """The documents of a text file, or of a JSON-lines file with a `text` entry a line.

    Raises:
        TextError: the file is missing, not UTF-8, not JSON lines, or holds no text.
    """
    if not path.is_file():
        raise TextError(f"--data {path}: no such file")
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TextError(f"--data {path}: not readable as UTF-8 text: {error}") from error
    lines = path.suffix == ".jsonl"
    documents = list(_json_lines(path, content) if lines else _pieces(content))
    if not any(document.strip() for document in documents):
        raise TextError(f"--data {path}: the file holds no text")
    return documents


def _json_lines(path: Path, content: str) -> Iterator[str]:
    for number, line in enumerate(content.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
        except (ValueError, KeyError, TypeError) as error:
            raise TextError(
                f'--data {path}: line {number} is not a JSON object with an entry "text"'
            ) from error
        yield str(text)


def _pieces(content: str) -> Iterator[str]:
    piece: list[str] = []
    length = 0
    for paragraph in content.split("\n\n"):
        piece.append(paragraph)
        length += len(paragraph)
        if length >= _DOCUMENT_CHARACTERS:
            yield "\n\n".join(piece)
            piece, length = [], 0
    if length:
        yield "\n\n".join(piece)


def read_corpus(files: Sequence[str], tokenizer: Tokenizer, split: str, seq_length: int) -> Corpus:
    """Reads, orders, tokenizes and splits the text.

    Args:
        files: text files; none means the built-in text.
        tokenizer: turns documents into tokens.
        split: weights of training and validation, for instance "95,5,0".
        seq_length: each split must hold at least one sequence of it.

    Raises:
        TextError: see `file_documents`; also when a split is too short or the weights are wrong.
    """
    texts = [text for name in files for text in file_documents(Path(name))] if files else None
    documents = builtin_documents() if texts is None else texts
    weights = _weights(split)
    # Ordered by content: independent of file names, and held-out text comes from all over.
    documents = sorted(set(documents), key=lambda text: hashlib.sha256(text.encode()).digest())
    tokens = [(*tokenizer.encode(text), tokenizer.eod) for text in documents if text.strip()]
    held_out = weights[1] / (weights[0] + weights[1])
    train, valid = _divide(tokens, held_out, seq_length)
    identity = json.dumps([tokenizer.unique_identifiers, split, seq_length, documents])
    corpus = Corpus(
        train=train,
        valid=valid,
        key=hashlib.sha256(identity.encode()).hexdigest()[:16],
        source=", ".join(files) if files else "Python's reference topics",
    )
    for name, count in (("training", corpus.train_tokens), ("held-out", corpus.valid_tokens)):
        if count < seq_length + 1:
            raise TextError(
                f"the {name} text has {count} tokens, but one sequence needs {seq_length + 1} "
                f"(--seq-length {seq_length}): give more text, or a smaller --seq-length"
            )
    return corpus


def _weights(split: str) -> tuple[float, float]:
    try:
        parts = [float(part) for part in split.split(",")]
    except ValueError:
        parts = []
    if len(parts) not in (2, 3) or min(parts, default=-1) < 0 or min(parts[:2]) <= 0:
        raise TextError(
            f"--split must be two or three weights, the first two above 0, such as 95,5,0: "
            f"got {split!r}"
        )
    return parts[0], parts[1]


def _divide(
    tokens: list[tuple[int, ...]], held_out: float, seq_length: int
) -> tuple[tuple[tuple[int, ...], ...], tuple[tuple[int, ...], ...]]:
    """Takes documents from the end until the share and one sequence are held out."""
    wanted = max(held_out * sum(map(len, tokens)), seq_length + 1)
    cut, count = len(tokens), 0
    while cut > 0 and count < wanted:
        cut -= 1
        count += len(tokens[cut])
    return tuple(tokens[:cut]), tuple(tokens[cut:])


def configured_corpus(config: TrainConfig) -> tuple[Corpus, Tokenizer]:
    """The text that the configuration names, checked and tokenized.

    Raises:
        TextError: see `read_corpus`.
        TokenizerError: see `load_tokenizer`.
    """
    tokenizer = load_tokenizer(config.batch.tokenizer)
    batch = config.batch
    return read_corpus(batch.data, tokenizer, batch.split, config.model.seq_length), tokenizer


def with_vocabulary(config: TrainConfig, tokenizer: Tokenizer) -> TrainConfig:
    """The configuration with the tokenizer's vocabulary size."""
    return config.replace(vocab_size=tokenizer.vocab_size)
