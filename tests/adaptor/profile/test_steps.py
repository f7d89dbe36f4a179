"""The seam around optimizer steps: order, failures, both training loops."""

import logging
import sys
from argparse import Namespace
from types import ModuleType

import pytest

from mindspeed.features.profile import steps
from mindspeed.train import TrainConfig, Trainer
from support.ranks import RankError, run_ranks

TINY = {
    "num_layers": 1,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "seq_length": 8,
    "vocab_size": 61,
    "make_vocab_size_divisible_by": 64,
    "micro_batch_size": 1,
    "train_iters": 3,
    "log_interval": 2,
}


class Hook:
    """Writes down what it is called for; raises in the methods named in `bad`."""

    def __init__(self, log, name="", bad=()):
        self.log, self.name, self.bad = log, name, bad

    def _note(self, method, *args):
        self.log.append((self.name + method, *args))
        if method in self.bad:
            raise OSError(f"{method} is broken")

    def begin(self, iteration):
        self._note("begin", iteration)

    def end(self, iteration):
        self._note("end", iteration)

    def line(self, iteration):
        self._note("line", iteration)
        return f"line {iteration}"

    def facts(self):
        self._note("facts")
        return {"rate": 2.0}

    def close(self):
        self._note("close")


def test_hooks_nest_in_order():
    log = []
    hooks = steps.StepHooks([Hook(log, "a."), Hook(log, "b.")])
    with hooks.step(7):
        log.append("step")
    assert log == [("a.begin", 7), ("b.begin", 7), "step", ("b.end", 7), ("a.end", 7)]
    log.clear()
    hooks.close()
    hooks.close()
    assert log == [("b.close",), ("a.close",)]


@pytest.mark.parametrize("bad", ["begin", "end"])
def test_a_failure_is_logged_once_and_only_what_reduces_goes_on(bad, caplog):
    log = []
    hooks = steps.StepHooks([Hook(log, bad=(bad,))], rank=3)
    with caplog.at_level(logging.ERROR, logger="mindspeed.profile"):
        for number in (1, 2, 3):
            with hooks.step(number):
                pass
        assert hooks.lines(3) == ["line 3"]
        assert hooks.facts() == {"rate": 2.0}
    assert [entry[0] for entry in log if entry[0] in ("begin", "end")].count(bad) == 1
    [record] = caplog.records
    message = record.getMessage()
    assert "rank 3: Hook failed" in message
    assert f"OSError: {bad} is broken" in message
    assert "training goes on" in message


def test_what_the_step_raises_passes_through():
    hooks = steps.StepHooks([Hook([])])
    with pytest.raises(ZeroDivisionError), hooks.step(1):
        raise ZeroDivisionError


def make_hook(values, rank, world_size):
    return Hook(LOG)


def make_bad_hook(values, rank, world_size):
    return Hook(LOG, bad=("end",))


LOG = []


def test_only_options_that_are_on_import_their_module(monkeypatch):
    monkeypatch.setattr(steps, "FACTORIES", {"profile": "no.such.module:x"})
    assert len(steps.StepHooks.of({"profile": False}, 0, 1)) == 0
    with pytest.raises(ModuleNotFoundError):
        steps.StepHooks.of({"profile": True}, 0, 1)


def refuse(values, rank, world_size):
    raise ValueError("no such rank")


def train(rank, world_size, factory):
    steps.FACTORIES = {"profile": factory}
    sys.modules["hooks_of_this_test"] = sys.modules[__name__]
    config = TrainConfig.of(**TINY, feature_flags=(("profile", True),))
    plain = TrainConfig.of(**TINY)
    with Trainer(plain) as trainer:
        expected = [result.loss for result in trainer.run(3)]
    with Trainer(config) as trainer:
        results = trainer.run(3)
    return expected, [r.loss for r in results], [r.notes for r in results], LOG


def test_the_trainer_calls_hooks_and_their_failure_changes_no_number():
    [(expected, losses, notes, log)] = run_ranks(
        train, 1, "hooks_of_this_test:make_bad_hook", preload="megatron"
    )
    assert losses == expected
    assert notes == [(), ("line 2",), ("line 3",)]
    assert log == [("begin", 1), ("end", 1), ("line", 2), ("line", 3), ("close",)]


def test_a_bad_flag_is_an_error_before_training():
    with pytest.raises(RankError, match="ConfigError: no such rank"):
        run_ranks(train, 1, "hooks_of_this_test:refuse", preload="megatron")


@pytest.fixture
def megatron_lm(monkeypatch):
    """A training package with the four names that the wrappers use."""
    args = Namespace(
        profile=True, use_pytorch_profiler=False, curr_iteration=0, log_interval=2,
    )  # fmt: skip
    printed, scalars = [], []
    package = ModuleType("megatron.training")
    package.get_args = lambda: args
    package.print_rank_last = printed.append
    writer = Namespace(add_scalar=lambda *each: scalars.append(each))
    package.get_tensorboard_writer = lambda: writer
    monkeypatch.setitem(sys.modules, "megatron.training", package)
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 0)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 1)
    monkeypatch.setitem(sys.modules, "hooks_of_this_test", sys.modules[__name__])
    monkeypatch.setattr(steps, "FACTORIES", {"profile": "hooks_of_this_test:make_hook"})
    LOG.clear()
    return args, printed, scalars


def test_megatron_lms_loop(megatron_lm):
    args, printed, scalars = megatron_lm
    step = steps.wrap_train_step(lambda *given, iteration: LOG.append(("step", given, iteration)))
    log = steps.wrap_training_log(lambda *given, is_first_iteration: given[3])

    def loop(iterations):
        assert args.profile is False  # or the loop would call CUDA's profiler
        for number in range(iterations):
            args.curr_iteration = number
            step("model", iteration=number)
            assert log({}, {}, 0.1, number + 1, 1.0, is_first_iteration=False) == number + 1

    steps.wrap_train(loop)(2)
    assert args.profile is True
    one = [("begin", 1), ("step", ("model",), 0), ("end", 1)]
    two = [("begin", 2), ("step", ("model",), 1), ("end", 2)]
    assert [*one, *two, ("line", 2), ("facts",), ("close",)] == LOG
    assert printed == ["line 2"]
    assert scalars == [("rate", 2.0, 2)]
    step("model", iteration=5)
    assert LOG[-1] == ("step", ("model",), 5)


def test_megatron_lms_loop_closes_hooks_after_an_error(megatron_lm):
    def loop():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        steps.wrap_train(loop)()
    assert LOG == [("close",)]
    assert megatron_lm[0].profile is True


def test_megatrons_own_torch_profiler_stays(megatron_lm):
    args = megatron_lm[0]
    args.use_pytorch_profiler = True
    seen = []
    steps.wrap_train(lambda: seen.append(args.profile))()
    assert seen == [True]
