"""`--op-cal-tflops`: which steps are counted, what a rate is made of, and that training is left
alone."""

import re
from argparse import Namespace

import pytest
import torch

from mindspeed.features.profile import flops
from mindspeed.features.profile.flops import RECOUNT, FlopHook, gather_integers, make_hook
from mindspeed.features.profile.steps import StepHooks
from mindspeed.train import TrainConfig, Trainer
from ms_profile import FlopMeter
from support.mutation import Mutation, assert_caught
from support.ranks import run_ranks

UNIT = 2 * 4 * 4 * 4  # FLOPs of one product below


class Clock:
    """Time that passes when told to."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(flops, "time", clock)
    return clock


class Job:
    """Steps of a number of sequences, one product each; counting makes a step slow."""

    def __init__(self, clock, **options):
        self.clock, self.sequences, self.iteration = clock, 1, 0
        options = {"gather": lambda numbers: [list(numbers)], **options}
        peak = options.pop("peak", None)
        self.hook = FlopHook(lambda: self.sequences, lambda n: 1000 * n, peak, **options)
        self.hooks = StepHooks([self.hook])

    def step(self, sequences, seconds):
        self.sequences = sequences
        self.iteration += 1
        a = torch.ones(4, 4)
        with self.hooks.step(self.iteration):
            counting = any(meter.is_on for meter in self.hook._meters)
            for _ in range(sequences):
                a @ a
            self.clock.now += seconds + (100.0 if counting else 0.0)
        return counting

    def line(self):
        [line] = self.hooks.lines(self.iteration) or [None]
        return line, self.hooks.facts()


def check_rates(clock):
    job = Job(clock, peak=1e6)
    assert [job.step(n, s) for n, s in ((1, 1.0), (2, 2.0), (1, 3.0))] == [True, True, False]
    line, facts = job.line()
    # The counted steps are slow and left out: one step of 1 sequence in 3 s.
    assert facts["tflops per device"] == pytest.approx(UNIT / 3.0 / 1e12)
    assert facts["tflops per device by formula"] == pytest.approx(1000 / 3.0 / 1e12)
    # Both sizes are known now: each step brings its own FLOPs to its own time.
    assert not any(job.step(n, s) for n, s in ((2, 1.0), (2, 1.0), (1, 8.0)))
    line, facts = job.line()
    assert facts["tflops per device"] == pytest.approx(5 * UNIT / 10.0 / 1e12)
    assert facts["mfu"] == pytest.approx(5 * UNIT / 10.0 / 1e6)
    assert re.fullmatch(
        r"TFLOP/s per device: \S+ by Megatron's formula, 6.4e-11 actual, 6.4e-11 actual with "
        r"recompute \| MFU 0.0%, HFU 0.0%",
        line,
    )


def test_flops_and_times_of_the_same_steps(clock):
    check_rates(clock)


def test_the_last_steps_count_for_all_is_caught(clock):
    """The mistake to avoid: FLOPs of one step by the time of others."""
    wrong = Mutation(
        "every step counts as the first shape",
        "mindspeed.features.profile.flops:FlopHook.end",
        "sums.add(*self._known[self._shape]",
        "sums.add(*self._known[min(self._known)]",
    )
    assert_caught(wrong, lambda: check_rates(clock))


def test_only_counted_steps(clock):
    job = Job(clock, every_step=True)
    assert [job.step(1, 1.0) for _ in range(3)] == [True] * 3
    line, facts = job.line()
    assert facts == {
        "tflops per device by formula": pytest.approx(1000 / 101 / 1e12),
        "tflops per device": pytest.approx(UNIT / 101 / 1e12),
        "tflops per device with recompute": pytest.approx(UNIT / 101 / 1e12),
    }
    assert "MFU" not in line


def test_a_shape_is_counted_again_now_and_then(clock):
    job = Job(clock)
    counting = [job.step(1, 1.0) for _ in range(2 * RECOUNT + 1)]
    assert [i for i, on in enumerate(counting) if on] == [0, RECOUNT, 2 * RECOUNT]


def test_a_line_without_steps(clock):
    job = Job(clock)
    assert job.line() == (None, {})


def test_a_meter_that_fails(clock, monkeypatch, caplog):
    def fail(self, *args):
        raise KeyError("broken")

    monkeypatch.setattr(FlopMeter, "after", fail)
    job = Job(clock)
    job.step(1, 1.0)
    job.step(1, 1.0)
    line, facts = job.line()
    assert "not counted, because the meter of a rank failed" in line
    assert facts == {}
    messages = [record.getMessage() for record in caplog.records]
    assert sum("FlopHook failed in end" in message for message in messages) == 1
    job.hooks.close()


def test_a_step_that_raises_leaves_no_meter_on(clock):
    job = Job(clock)
    with pytest.raises(ValueError, match="inside"), job.hooks.step(1):
        raise ValueError("inside")
    job.hooks.close()
    assert not any(meter.is_on for meter in job.hook._meters)


def test_unknown_operators_are_named(clock, monkeypatch):
    from ms_profile.flops import registry

    monkeypatch.delitem(registry._BUILT_IN, "aten::mm")
    from torch.utils.flop_counter import flop_registry

    monkeypatch.delitem(flop_registry, torch.ops.aten.mm)
    job = Job(clock)
    with pytest.warns(UserWarning, match="not counted: aten::mm"):
        job.step(1, 1.0)
    assert job.line()[0].endswith("0 actual with recompute | without aten::mm")


LARGE = [0, 1, 2**31 - 1, 2**31, 2**53 + 1, 2**62 - 1]


def ranks_body(rank, world_size):
    """Numbers of every rank, and a hook whose ranks take unequal times, one of them failing."""
    found = gather_integers([number - (rank if number else 0) for number in LARGE])
    clock = flops.time = Clock()
    job = Job(clock, peak=1e6, gather=gather_integers)
    job.step(1, 0.0)
    job.step(1 + rank, 0.0)
    job.step(1, 1.0 + rank)
    healthy = job.line()
    if rank == 1:
        FlopMeter.after = None
    job.step(5, 1.0)
    return found, healthy, job.line()


def test_ranks_are_brought_together():
    """Sums over ranks by the time of the slowest, integers whole, one failure told to all."""
    results = run_ranks(ranks_body, 3)
    expected = [[number - (rank if number else 0) for number in LARGE] for rank in range(3)]
    for found, healthy, broken in results:
        assert found == expected
        assert healthy == results[0][1]
        assert "rank failed" in broken[0]
        assert broken[1] == {}
    # Step 2 is plain on rank 0 only, which has both sizes counted: 2 products there, 1 elsewhere.
    facts = results[0][1][1]
    assert facts["tflops per device"] == pytest.approx(4 * UNIT / (3.0 * 3) / 1e12)


TINY = {
    "num_layers": 1,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "seq_length": 8,
    "vocab_size": 61,
    "make_vocab_size_divisible_by": 64,
    "micro_batch_size": 1,
    "global_batch_size": 2,
    "train_iters": 4,
    "log_interval": 2,
}


def test_training_is_the_same_to_the_bit():
    def run(*flags):
        with Trainer(TrainConfig.of(**TINY, feature_flags=flags)) as trainer:
            results = trainer.run(4)
            return results, trainer.parameters()

    plain, weights = run()
    counted, same = run(("op_cal_tflops", True))
    assert [(r.loss, r.grad_norm) for r in counted] == [(r.loss, r.grad_norm) for r in plain]
    assert all(torch.equal(same[name], weight) for name, weight in weights.items())
    assert [len(r.notes) for r in counted] == [0, 1, 0, 1]
    found = re.match(
        r"TFLOP/s per device: (\S+) by Megatron's formula, (\S+) act", counted[1].notes[0]
    )
    formula, actual = map(float, found.groups())
    # Level 0 multiplies the half of the scores that the formula leaves out.
    tokens, h = 2 * 8, 16
    by_formula = 6 * tokens * (12 * h * h + 8 * h + h * 64)
    assert actual / formula == pytest.approx(
        (by_formula + 6 * tokens * 8 * h) / by_formula, rel=1e-3
    )


def test_batches_that_grow(monkeypatch):
    """In Megatron-LM the number of micro batches is asked for at each step."""
    from megatron.core import num_microbatches_calculator as calculator

    now = [2]
    monkeypatch.setattr(calculator, "get_num_microbatches", lambda: now[0])
    values = {"padded_vocab_size": 64, "micro_batch_size": 3, "data_parallel_size": 5}
    sequences = flops._sequences(values, 40)
    assert sequences() == 30
    now[0] = 4
    assert sequences() == 60


@pytest.mark.parametrize(
    ("values", "varies"),
    [
        ({}, False),
        ({"variable_seq_lengths": True}, True),
        ({"moe_expert_capacity_factor": 1}, True),
    ],
)
def test_shapes_that_vary_are_counted_every_step(values, varies):
    plan = {**TrainConfig.of(**TINY).plan_values(), **values}
    assert make_hook(plan, 0, 1)._every_step is varies
    assert ("every step" in flops.advise(Namespace(**plan))) is varies
