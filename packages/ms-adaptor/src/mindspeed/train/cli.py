"""`mindspeed train`: the command."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import replace

from mindspeed.train.args import Options, UsageError, parse
from mindspeed.train.config import TrainConfig
from mindspeed.train.level import LevelError, available_levels, config_for, levels_with_features
from mindspeed.train.runs import RunPlan, check_text, plan_run
from mindspeed.train.state import CheckpointError
from mindspeed.train.status import WRONG_USAGE
from mindspeed.train.text import TextError
from mindspeed.train.tokenizer import TokenizerError
from mindspeed.train.validate import ConfigError, check

_USER_ERRORS = (
    UsageError,
    ConfigError,
    CheckpointError,
    TextError,
    TokenizerError,
    LevelError,
)


def main(argv: Sequence[str]) -> int:
    """Trains, and returns the exit status.

    Returns:
        0 done; 1 a rank failed; 2 the command line cannot work, nothing was started or written;
        130 stopped by Ctrl-C.
    """
    try:
        _need_packages()
        # Without a word the command demonstrates itself: level against level, if there are two.
        options = parse(argv or (["--compare-levels"] if _comparable(parse([]).config) else []))
        plan, levels = prepare(options)
    except _USER_ERRORS as error:
        print(f"mindspeed train: error: {error}", file=sys.stderr)
        return WRONG_USAGE
    from mindspeed.train.job import run_job

    return run_job(options, plan, levels)


def prepare(options: Options) -> tuple[RunPlan, list[int]]:
    """Every check that needs no process, and the levels that will train.

    Raises:
        ValueError: one of this package's errors, with what to do.
    """
    from mindspeed.train.text import configured_corpus, with_vocabulary

    levels = _levels(options)
    plan = plan_run(options)
    check(plan.config, options.nproc)
    corpus, tokenizer = configured_corpus(plan.config)
    plan = replace(plan, config=with_vocabulary(plan.config, tokenizer), text=corpus.key)
    check_text(plan, options.given)
    check(plan.config, options.nproc)
    _check_plans(plan.config, levels, options.nproc)
    return plan, levels


def _comparable(config: TrainConfig) -> bool:
    reasons = available_levels()
    return sum(reasons[level] is None for level in levels_with_features(config)) > 1


def _levels(options: Options) -> list[int]:
    asked = options.config.optimization_level
    reasons = available_levels()
    if reasons[asked] is not None and "optimization_level" in options.given:
        raise LevelError(f"--optimization-level {asked}: {reasons[asked]}")
    # A level that adds nothing here would only repeat the one below it.
    found = levels_with_features(options.config)
    usable = [n for n in found if n <= asked and reasons[n] is None]
    if not options.compare_levels:
        return usable[-1:]
    if len(usable) < 2:
        raise LevelError(f"--compare-levels needs a level above 0: {reasons[1] or 'ask for one'}")
    return usable


def _check_plans(config: TrainConfig, levels: Sequence[int], nproc: int) -> None:
    """The rules of every feature, before any process starts."""
    import mindspeed
    from mindspeed.features.memory.planner import rules
    from mindspeed.features.profile import trace
    from mindspeed.patching.detect import device_type

    for level in levels:
        of_level = config_for(config, level, levels)
        check(of_level, nproc)
        values = of_level.plan_values()
        try:
            mindspeed.plan(values, level)
            trace.check(values, nproc)
            rules.check(values, device_type())
        except ValueError as error:
            raise ConfigError(str(error)) from error


def _need_packages() -> None:
    wanted = {"megatron.core": "megatron-core", "ms_profile": "ms-profile", "torch": "torch"}
    for module, package in wanted.items():
        try:
            found = importlib.util.find_spec(module)
        except ModuleNotFoundError:
            found = None
        if found is None:
            raise UsageError(f"{package} is not installed: pip install 'mindspeed[train]'")
