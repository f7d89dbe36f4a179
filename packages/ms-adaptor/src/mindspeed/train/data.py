"""Megatron's indexed dataset from text, and its GPT datasets over it."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from mindspeed.features.level0.dataset_helpers import compile_helpers
from mindspeed.train.batches import SampleSource
from mindspeed.train.config import TrainConfig
from mindspeed.train.text import Corpus, TextError, configured_corpus
from mindspeed.train.tokenizer import Tokenizer

_FACTS = "corpus.json"
_SPLITS = ("train", "valid")


def indexed_folder(cache: Path, corpus: Corpus) -> Path:
    """Where the indexed dataset of a corpus lies."""
    return cache / corpus.key


def write_indexed(corpus: Corpus, tokenizer: Tokenizer, cache: Path) -> Path:
    """Writes train.bin/.idx and valid.bin/.idx unless they exist; one process calls it.

    Returns:
        The folder, named by the corpus' content.
    """
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    folder = indexed_folder(cache, corpus)
    if (folder / _FACTS).is_file():
        return folder
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    partial.mkdir(parents=True)
    dtype = DType.optimal_dtype(tokenizer.vocab_size)
    for split in _SPLITS:
        builder = IndexedDatasetBuilder(str(partial / f"{split}.bin"), dtype=dtype)
        for document in getattr(corpus, split):
            builder.add_document(torch.tensor(document), [len(document)])
        builder.finalize(str(partial / f"{split}.idx"))
    facts = {
        "source": corpus.source,
        "tokenizer": tokenizer.unique_identifiers,
        "train_tokens": corpus.train_tokens,
        "valid_tokens": corpus.valid_tokens,
        "dtype": np.dtype(dtype).name,
    }
    (partial / _FACTS).write_text(json.dumps(facts, indent=1) + "\n")
    try:
        os.replace(partial, folder)
    except OSError:  # another job wrote the same content meanwhile
        shutil.rmtree(partial)
    return folder


def open_datasets(
    config: TrainConfig, folder: Path, tokenizer: Tokenizer
) -> tuple[SampleSource, SampleSource]:
    """Megatron's GPT datasets over one epoch of each split; every rank calls it.

    One epoch, repeated by the batches, keeps the order of samples independent of how long a job
    runs, so that a job can be resumed for longer.
    """
    from megatron.core.datasets.blended_megatron_dataset_builder import (
        BlendedMegatronDatasetBuilder,
    )
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    blends = [([str(folder / split)], None) for split in _SPLITS]
    options = GPTDatasetConfig(
        random_seed=config.seed,
        sequence_length=config.model.seq_length,
        blend_per_split=[*blends, None],
        path_to_cache=str(folder / "samples"),
        tokenizer=tokenizer,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    builder = BlendedMegatronDatasetBuilder(GPTDataset, [None, None, None], lambda: True, options)
    train, valid, _ = builder.build()
    for name, dataset in (("training", train), ("held-out", valid)):
        if len(dataset) == 0:
            raise TextError(f"the {name} text gives no whole sequence: shorten --seq-length")
    return train, valid


def prepare_datasets(config: TrainConfig, cache: Path) -> tuple[SampleSource, SampleSource]:
    """Builds the indexed dataset on rank 0 if need be, then opens it on every rank."""
    corpus, tokenizer = configured_corpus(config)
    if dist.get_rank() == 0:
        compile_helpers()
        write_indexed(corpus, tokenizer, cache)
    dist.barrier()
    return open_datasets(config, indexed_folder(cache, corpus), tokenizer)
