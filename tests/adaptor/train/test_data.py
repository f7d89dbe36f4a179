"""Text to Megatron's indexed dataset: deterministic, split without overlap, clear errors."""

import json

import pytest
import torch

from mindspeed.train import TrainConfig
from mindspeed.train.batches import MicroBatches, SyntheticSamples
from mindspeed.train.data import prepare_datasets
from mindspeed.train.text import TextError, builtin_documents, read_corpus, with_vocabulary
from mindspeed.train.tokenizer import ByteTokenizer, TokenizerError, load_tokenizer
from support.ranks import run_ranks

LENGTH = 64


def corpus(files=(), split="95,5,0", length=LENGTH):
    return read_corpus([str(file) for file in files], ByteTokenizer(), split, length)


def test_builtin_text_is_deterministic_and_split_without_overlap():
    first, second = corpus(), corpus()
    assert first == second
    assert not set(first.train) & set(first.valid)
    assert len(first.train) + len(first.valid) == len(set(builtin_documents()))
    share = first.valid_tokens / (first.valid_tokens + first.train_tokens)
    assert 0.05 <= share < 0.15


def test_key_follows_content():
    base = corpus().key
    assert corpus(split="90,10,0").key != base
    assert corpus(length=32).key != base


def test_bytes_round_trip():
    tokenizer = ByteTokenizer()
    text = "a\u00e9\u4e2d"
    assert bytes(tokenizer.encode(text)).decode() == text
    assert tokenizer.eod == 256 < tokenizer.vocab_size


def test_one_plain_file_gives_both_splits(tmp_path):
    file = tmp_path / "book.txt"
    file.write_text("\n\n".join(f"paragraph {i} " + "word " * 200 for i in range(60)))
    got = corpus([file])
    assert got.train
    assert got.valid


def test_json_lines(tmp_path):
    file = tmp_path / "docs.jsonl"
    file.write_text("\n".join(json.dumps({"text": f"document {i} " * 40}) for i in range(9)))
    got = corpus([file])
    assert len(got.train) + len(got.valid) == 9


def missing(tmp_path):
    return tmp_path / "none.txt", "no such file"


def empty(tmp_path):
    file = tmp_path / "empty.txt"
    file.write_text(" \n\n ")
    return file, "holds no text"


def binary(tmp_path):
    file = tmp_path / "binary.txt"
    file.write_bytes(b"\xff\xfe\x00\x80" * 10)
    return file, "not readable as UTF-8"


def short(tmp_path):
    file = tmp_path / "short.txt"
    file.write_text("too short")
    return file, "--seq-length 64"


def not_json(tmp_path):
    file = tmp_path / "bad.jsonl"
    file.write_text('{"text": "fine"}\n{"body": 1}\n')
    return file, "line 2"


@pytest.mark.parametrize("make", [missing, empty, binary, short, not_json])
def test_bad_text_is_named(make, tmp_path):
    file, message = make(tmp_path)
    with pytest.raises(TextError, match=message):
        corpus([file])


@pytest.mark.parametrize("split", ["", "95", "a,b", "95,0,5", "-1,5"])
def test_bad_split(split):
    with pytest.raises(TextError, match="--split"):
        corpus(split=split)


def test_missing_tokenizer_file(tmp_path):
    with pytest.raises(TokenizerError, match=r"pip install tokenizers|no such file"):
        load_tokenizer(str(tmp_path / "tokenizer.json"))


def opened(rank, world_size, cache):
    from pathlib import Path

    config = with_vocabulary(TrainConfig.of(seq_length=LENGTH), ByteTokenizer())
    train, valid = prepare_datasets(config, Path(cache))
    rows = torch.stack([train[i]["tokens"] for i in range(len(train))])
    labels = torch.stack([train[i]["labels"] for i in range(len(train))])
    held_out = torch.stack([valid[i]["tokens"] for i in range(len(valid))])
    return rows.numpy(), labels.numpy(), held_out.numpy(), sorted(train[0])


def test_indexed_dataset_holds_the_text(tmp_path):
    first, second = run_ranks(opened, 2, str(tmp_path), preload="megatron")
    again = run_ranks(opened, 1, str(tmp_path), preload="megatron")[0]
    tokens, labels, held_out, names = first
    assert (tokens == second[0]).all()
    assert (tokens == again[0]).all()
    assert (tokens[:, 1:] == labels[:, :-1]).all()
    assert names == ["labels", "loss_mask", "position_ids", "tokens"]
    wanted = corpus()
    assert abs(tokens.size - wanted.train_tokens) <= LENGTH + 1
    assert abs(held_out.size - wanted.valid_tokens) <= LENGTH + 1
    text = b"".join(bytes(document[:-1]) for document in wanted.train)
    inside = [bytes(row.tolist()) in text for row in tokens[:50] if row.max() < 256]
    assert inside
    assert all(inside)
    (folder,) = tmp_path.iterdir()
    files = {file.name for file in folder.iterdir()}
    assert {"train.bin", "train.idx", "valid.bin", "valid.idx"} <= files


def written(rank, world_size, cache):
    from pathlib import Path

    config = with_vocabulary(TrainConfig.of(seq_length=LENGTH), ByteTokenizer())
    prepare_datasets(config, Path(cache))
    (folder,) = Path(cache).iterdir()
    return folder.name, (folder / "train.bin").stat().st_mtime_ns


def test_indexed_dataset_is_written_once_for_one_content(tmp_path):
    first = run_ranks(written, 1, str(tmp_path), preload="megatron")
    assert run_ranks(written, 2, str(tmp_path), preload="megatron") == first * 2
    assert first[0][0] == corpus().key


def test_micro_batches_of_all_copies_cover_the_global_batch():
    source = SyntheticSamples(8, 50, seed=3)

    def samples(copies, rounds):
        device = torch.device("cpu")
        parts = [MicroBatches(source, 2, rank, copies, device) for rank in range(copies)]
        return torch.cat([part.at(i)["tokens"] for i in range(rounds) for part in parts])

    assert torch.equal(samples(1, 4), samples(2, 2))
    assert torch.equal(samples(1, 4), samples(4, 1))


def test_micro_batches_start_again_at_the_end():
    batches = MicroBatches(SyntheticSamples(4, 9, size=3), 2, 0, 1, torch.device("cpu"))
    whole = torch.cat([batches.at(i)["tokens"] for i in range(3)])
    assert torch.equal(whole[:3], whole[3:])
