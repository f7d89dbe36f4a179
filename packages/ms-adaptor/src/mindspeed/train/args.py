"""The command line of `mindspeed train`: parsing, and every check that needs no process."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from mindspeed.train.config import TrainConfig, section_of_leaf
from mindspeed.train.flags import GROUPS, Row, leaf_types

LATEST = "latest"
# The job of `mindspeed train` without any flag: minutes on two cores, attention worth its name.
DEFAULT_JOB: dict[str, Any] = {
    "num_layers": 4,
    "hidden_size": 128,
    "num_attention_heads": 4,
    "seq_length": 1024,
    "normalization": "RMSNorm",
    "swiglu": True,
    "add_bias_linear": False,
    "micro_batch_size": 1,
    "global_batch_size": 4,
    "lr": 2e-3,
    "min_lr": 2e-4,
    "lr_warmup_iters": 4,
    "train_iters": 60,
    "use_distributed_optimizer": True,
    "distributed_timeout": 120.0,
}
_TYPES = {"int": int, "float": float, "str": str}

_EXAMPLES = """examples:
  mindspeed train                               built-in text, two processes, level 0 against 1
  mindspeed train --optimization-level 1        that level alone
  mindspeed train --compare-levels --bf16       every level in turns, in bfloat16
  mindspeed train --nproc 4 --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2
  mindspeed train --save --save-interval 20     keep checkpoints; then, after a stop:
  mindspeed train --resume                      go on where the latest run stopped
"""


@dataclass(frozen=True)
class Options:
    """What one call of the command asks for.

    Attributes:
        config: the training configuration, complete except for what a resumed run stored.
        given: configuration leaves that were named on the command line.
        nproc: number of processes.
        compare_levels: train with every level up to the asked one.
        resume: None, "latest" or a folder.
        reshard: a checkpoint may be cut anew.
        save: None, "" for the run's own folder, or a folder.
        save_interval: save every n steps.
        async_save: write checkpoints in another process.
        name: the run's name; None for one made of the time.
        runs: the folder that holds all runs.
    """

    config: TrainConfig
    given: frozenset[str]
    nproc: int
    compare_levels: bool
    resume: str | None
    reshard: bool
    save: str | None
    save_interval: int | None
    async_save: bool
    name: str | None
    runs: Path


class UsageError(ValueError):
    """A command line that cannot work."""


def parse(argv: Sequence[str]) -> Options:
    """Parses the arguments of `mindspeed train`.

    Raises:
        UsageError: options that exclude each other.
        SystemExit: a flag is unknown, planned, or has a value of the wrong type (status 2).
    """
    from mindspeed import levels

    space = vars(build_parser().parse_args(list(argv)))
    leaves = section_of_leaf()
    given = {name: value for name, value in space.items() if name in leaves}
    _virtual_stages(space, given)
    _query_groups(space, given)
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
    base = TrainConfig.of(**DEFAULT_JOB, optimization_level=levels.DEFAULT_LEVEL)
    if "train_iters" in given and "lr_warmup_iters" not in given:
        base = base.replace(
            lr_warmup_iters=min(base.optim.lr_warmup_iters, given["train_iters"] // 8)
        )
    known = {*leaves, *_RUN_OPTIONS, "layers_per_virtual_stage", "group_query_attention"}
    features = {name: value for name, value in space.items() if name not in known}
    config = base.replace(**given, feature_flags=tuple(sorted(features.items())))
    options = Options(
        config=config,
        given=frozenset(given),
        **{name: space[name] for name in _RUN_OPTIONS},
    )
    _check_run(options)
    return options


_RUN_OPTIONS = (
    "nproc",
    "compare_levels",
    "resume",
    "reshard",
    "save",
    "save_interval",
    "async_save",
    "name",
    "runs",
)


def build_parser() -> argparse.ArgumentParser:
    """The parser; configuration flags leave no attribute unless they are given."""
    from mindspeed.features.flags import add_flags

    parser = _Parser(
        prog="mindspeed train",
        usage="mindspeed train [options]",
        description="Train a GPT through megatron-core on this machine.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    _add_run_options(parser)
    types, default = leaf_types(), TrainConfig.of(**DEFAULT_JOB).flat()
    for title, rows in GROUPS.items():
        group = parser.add_argument_group(title)
        for row in rows:
            group.add_argument(row.flag, **_argument(row, types[row.leaf], default[row.leaf]))
        if title == "parallelism":
            group.add_argument(
                "--num-layers-per-virtual-pipeline-stage",
                dest="layers_per_virtual_stage",
                metavar="N",
                type=int,
                help="the same, by layers of a chunk",
            )
        if title == "model":
            group.add_argument(
                "--group-query-attention", action="store_true", help="share key and value heads"
            )
    # Features' own flags, and an explanation for each MindSpeed flag that is not built yet.
    own = set(parser._actions)
    add_flags(parser)
    for action in parser._actions:
        if action not in own:
            action.default = argparse.SUPPRESS
    return parser


class _Parser(argparse.ArgumentParser):
    """Errors without the usage lines, which would fill a screen."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def _argument(row: Row, annotation: str, default: Any) -> dict[str, Any]:
    text = row.help if default is None or row.off else f"{row.help} [{_show(default)}]"
    if annotation.startswith("bool"):
        action = "store_false" if row.off else argparse.BooleanOptionalAction
        return {"dest": row.leaf, "action": action, "help": row.help}
    options: dict[str, Any] = {"dest": row.leaf, "help": text.replace("%", "%%")}
    if annotation.startswith("tuple"):
        return {**options, "nargs": "+", "metavar": "NAME"}
    options["type"] = _TYPES[annotation.split(" ")[0]]
    if row.choices:
        return {**options, "choices": row.choices}
    return {**options, "metavar": {"int": "N", "float": "X"}.get(annotation.split(" ")[0], "TEXT")}


def _show(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _add_run_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("run")
    add = group.add_argument
    add("--nproc", type=int, default=2, metavar="N", help="processes [2]")
    add(
        "--compare-levels",
        action="store_true",
        default=False,
        help="train with every level up to the asked one, in turns, and compare",
    )
    add(
        "--resume",
        nargs="?",
        const=LATEST,
        default=None,
        metavar="FOLDER",
        help="go on from a run's or a checkpoint's folder [the latest run]",
    )
    add(
        "--reshard",
        action="store_true",
        default=False,
        help="let --resume change the number of processes or the split of the model",
    )
    add(
        "--save",
        nargs="?",
        const="",
        default=None,
        metavar="FOLDER",
        help="save at the end, and when stopped [in the run's folder]",
    )
    add("--save-interval", type=int, default=None, metavar="N", help="save every n steps as well")
    add("--async-save", action="store_true", default=False, help="write in another process")
    add("--name", default=None, metavar="TEXT", help="name of the run [the time]")
    add("--runs", type=Path, default=Path("runs"), metavar="FOLDER", help="where runs lie [runs]")


def _virtual_stages(space: dict[str, Any], given: dict[str, Any]) -> None:
    """Translates layers of a chunk into chunks of a rank, as Megatron's older flag means."""
    layers = space.get("layers_per_virtual_stage")
    if layers is None:
        return
    if "virtual_pipeline_model_parallel_size" in given:
        raise UsageError(
            "--num-layers-per-virtual-pipeline-stage and --num-virtual-stages-per-pipeline-rank "
            "say the same thing: give one of them"
        )
    total = given.get("num_layers", DEFAULT_JOB["num_layers"])
    stages = given.get("pipeline_model_parallel_size", 1)
    if layers < 1 or total % (stages * layers):
        raise UsageError(
            f"--num-layers ({total}) is not divisible by --pipeline-model-parallel-size ({stages})"
            f" x --num-layers-per-virtual-pipeline-stage ({layers})"
        )
    given["virtual_pipeline_model_parallel_size"] = total // (stages * layers)


def _query_groups(space: dict[str, Any], given: dict[str, Any]) -> None:
    grouped = "group_query_attention" in space
    if grouped and "num_query_groups" not in given:
        given["num_query_groups"] = 1
    if not grouped and "num_query_groups" in given:
        raise UsageError("--num-query-groups acts only with --group-query-attention: add it")


def _check_run(options: Options) -> None:
    if options.nproc < 1:
        raise UsageError(f"--nproc must be at least 1, got {options.nproc}")
    if options.save_interval is not None and options.save_interval < 1:
        raise UsageError(f"--save-interval must be at least 1, got {options.save_interval}")
    if options.save is None and options.resume is None and options.save_interval is not None:
        raise UsageError("--save-interval acts only with --save: add it")
    if options.save is None and options.resume is None and options.async_save:
        raise UsageError("--async-save acts only with --save: add it")
    if options.reshard and options.resume is None:
        raise UsageError("--reshard acts only with --resume: add it")
    if options.compare_levels and options.resume is not None:
        raise UsageError(
            "--resume continues one level: leave out --compare-levels, "
            "and name the level with --optimization-level if it changes"
        )
    name = options.name
    if name is not None and (not name or name in (".", "..") or os.sep in name or name == LATEST):
        raise UsageError(f"--name must be a plain folder name other than {LATEST!r}, got {name!r}")
