"""`--op-cal-tflops`: the rate and the utilisation of the FLOPs that training really does.

One step is counted for each shape of a step, and again now and then; the others cost nothing. A
rate is made of steps whose FLOPs and times are both known and belong together: the counted ones,
which the meter slows down, are left out where there are others.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from mindspeed.features.profile.formula import step_formula
from mindspeed.patching.records import Feature

if TYPE_CHECKING:
    from ms_profile import FlopMeter

FEATURE = Feature(
    name="profile.flops",
    level=0,
    doc="Counts the FLOPs of steps and logs TFLOP/s per device, MFU and HFU.",
    packages=("ms-profile",),
    advise="mindspeed.features.profile.flops:advise",
    page="docs/profile/flops.md",
)

# Options under which sequences of other lengths come at each step.
VARYING = ("variable_seq_lengths", "sft", "rl_use_sequence_packing")

# Steps after which the same shapes are counted once more.
RECOUNT = 100


def advise(config: Any) -> str:
    """Say what counting costs for a configuration.

    Args:
        config: anything with Megatron's configuration names as attributes.
    """
    if _shapes_vary(vars(config)):
        return "lengths vary, so every step is counted, which costs where operators are short"
    return f"counts one step in {RECOUNT} and the first of each batch size: costs nothing otherwise"


@dataclass
class Sums:
    """FLOPs and time of some steps of one rank, as integers that travel between ranks.

    Attributes:
        steps: how many.
        model: FLOPs that the model needs, masked attention entries left out.
        hardware: FLOPs that were launched: recomputation, and scores that backward computes again.
        formula: FLOPs by Megatron's formula, of all ranks.
        microseconds: wall time of the steps.
    """

    steps: int = 0
    model: int = 0
    hardware: int = 0
    formula: int = 0
    microseconds: int = 0

    def add(self, model: int, hardware: int, formula: int, seconds: float) -> None:
        """Add one step."""
        self.steps += 1
        self.model += model
        self.hardware += hardware
        self.formula += formula
        self.microseconds += round(seconds * 1e6)

    def numbers(self) -> list[int]:
        """The fields in order."""
        return [getattr(self, field.name) for field in fields(self)]


@dataclass(frozen=True)
class Rates:
    """What one log interval came to, equal on every rank; TFLOP/s per device."""

    formula: float
    actual: float
    with_recompute: float
    mfu: float | None
    hfu: float | None


class FlopHook:
    """Counts steps and reports rates; see `mindspeed.features.profile.steps.StepHook`.

    Args:
        sequences: returns the sequences of the step that begins, over all ranks; it names the
            step's shape.
        formula: FLOPs of all ranks for so many sequences.
        peak: FLOP/s of one device, None when unknown.
        every_step: shapes change within a step's number of sequences: count all.
        gather: brings every rank's numbers together.
    """

    def __init__(
        self,
        sequences: Callable[[], int],
        formula: Callable[[int], int],
        peak: float | None,
        *,
        every_step: bool = False,
        gather: Callable[[Sequence[int]], list[list[int]]] | None = None,
    ) -> None:
        from ms_profile import FlopMeter

        self._sequences = sequences
        self._formula = formula
        self._peak = peak
        self._every_step = every_step
        self._gather = gather or gather_integers
        self._meters: tuple[FlopMeter, ...] = tuple(
            FlopMeter(attention=kind, unknown="warn", by_module=False)
            for kind in ("model", "launched")
        )
        for meter in self._meters:
            meter.tolerant = True
        self._known: dict[int, tuple[int, int]] = {}
        self._since_count = 0
        self._counting = False
        self._shape = 0
        self._start = 0.0
        self._failed = False
        self._plain, self._counted = Sums(), Sums()
        self._rates: Rates | None = None

    def begin(self, iteration: int) -> None:
        """Start the clock, and the meters if this step is to be counted."""
        self._shape = self._sequences()
        due = self._every_step or self._since_count >= RECOUNT
        if due or self._shape not in self._known:
            for meter in self._meters:
                meter.reset()
                meter.__enter__()
            self._counting = True
            self._since_count = 0
        self._start = time.perf_counter()

    def end(self, iteration: int) -> None:
        """Take the step into the interval's sums."""
        seconds = time.perf_counter() - self._start
        counted = self._counting
        self._since_count += 1
        if counted:
            self._leave()
            self._known[self._shape] = self._read()
        sums = self._counted if counted else self._plain
        sums.add(*self._known[self._shape], self._formula(self._shape), seconds)

    def _leave(self) -> None:
        self._counting = False
        for meter in reversed(self._meters):
            meter.__exit__(None, None, None)

    def _read(self) -> tuple[int, int]:
        for meter in self._meters:
            if meter.failure is not None:
                self._failed = True
                raise RuntimeError("FLOPs are not counted any more") from meter.failure
        model, launched = self._meters
        return model.counts.model, launched.counts.hardware

    def line(self, iteration: int) -> str | None:
        """The rates since the last line; every rank calls it, at the same iteration."""
        rows = self._gather([*self._interval().numbers(), int(self._failed)])
        self._plain, self._counted = Sums(), Sums()
        self._rates = self._rate(rows)
        if any(row[-1] for row in rows):
            return "TFLOP/s per device: not counted, because the meter of a rank failed"
        if self._rates is None:
            return None
        return self._text(self._rates)

    def _interval(self) -> Sums:
        return self._plain if self._plain.steps else self._counted

    def _rate(self, rows: Sequence[Sequence[int]]) -> Rates | None:
        """Sums over ranks by the time of the slowest; the formula holds for all ranks together."""
        steps, model, hardware, formula, time_us, failed = map(list, zip(*rows, strict=True))
        if any(failed) or not all(steps) or not max(time_us):
            return None
        device_seconds = max(time_us) / 1e6 * len(rows)
        by_formula, actual, launched = (
            number / device_seconds for number in (formula[0], sum(model), sum(hardware))
        )
        return Rates(
            formula=by_formula / 1e12,
            actual=actual / 1e12,
            with_recompute=launched / 1e12,
            mfu=None if self._peak is None else actual / self._peak,
            hfu=None if self._peak is None else launched / self._peak,
        )

    def _text(self, rates: Rates) -> str:
        parts = [
            f"TFLOP/s per device: {rates.formula:.4g} by Megatron's formula, {rates.actual:.4g} "
            f"actual, {rates.with_recompute:.4g} actual with recompute"
        ]
        if rates.mfu is not None and rates.hfu is not None:
            parts.append(f"MFU {rates.mfu:.1%}, HFU {rates.hfu:.1%}")
        if self._meters[0].uncounted:
            parts.append(f"without {', '.join(self._meters[0].uncounted)}")
        return " | ".join(parts)

    def facts(self) -> Mapping[str, float]:
        """The rates of the last line."""
        if self._rates is None:
            return {}
        named = {
            "tflops per device by formula": self._rates.formula,
            "tflops per device": self._rates.actual,
            "tflops per device with recompute": self._rates.with_recompute,
            "mfu": self._rates.mfu,
            "hfu": self._rates.hfu,
        }
        return {name: value for name, value in named.items() if value is not None}

    def close(self) -> None:
        """Leave meters that a step which raised has left on."""
        if self._counting:
            self._leave()


def make_hook(values: Mapping[str, Any], rank: int, world_size: int) -> FlopHook:
    """The hook of a rank.

    Args:
        values: every option by name.
        rank: this process.
        world_size: number of ranks.
    """
    del rank
    from ms_profile import peak_flops

    device = _device()
    return FlopHook(
        _sequences(values, world_size),
        step_formula(values),
        None if device == "cpu" else peak_flops(device, _dtype(values)),
        every_step=_shapes_vary(values),
    )


def _dtype(values: Mapping[str, Any]) -> str:
    if values.get("bf16"):
        return "bfloat16"
    return "float16" if values.get("fp16") else "float32"


def _shapes_vary(values: Mapping[str, Any]) -> bool:
    """Whether steps of as many sequences may differ in FLOPs."""
    drops = values.get("moe_expert_capacity_factor") is not None
    return drops or any(values.get(name) for name in VARYING)


def _sequences(values: Mapping[str, Any], world_size: int) -> Callable[[], int]:
    """Sequences of a step; Megatron-LM may let the number grow."""
    if "padded_vocab_size" in values:
        from megatron.core.num_microbatches_calculator import get_num_microbatches

        each = values["micro_batch_size"] * values["data_parallel_size"]
        return lambda: int(each * get_num_microbatches())
    from mindspeed.train.config import TrainConfig, section_of_leaf

    leaves = {name: values[name] for name in section_of_leaf() if name in values}
    number = TrainConfig.of(**leaves).global_batch_size(world_size)
    return lambda: number


def _device() -> str:
    import torch

    from mindspeed import device

    found = device.current()
    if found is not None:
        return found.type
    return "cuda" if torch.cuda.is_available() else "cpu"


def gather_integers(numbers: Sequence[int]) -> list[list[int]]:
    """Every rank's numbers, [rank][index].

    They travel as pairs of 31-bit words, since not every backend carries 64-bit integers.

    Args:
        numbers: 0 to 2**62 - 1, equally many on every rank.
    """
    import torch
    import torch.distributed as dist

    if not dist.is_initialized():
        return [list(numbers)]
    words = [word for number in numbers for word in (number >> 31, number & 0x7FFFFFFF)]
    device = "cpu" if dist.get_backend() == "gloo" else _device()
    mine = torch.tensor(words, dtype=torch.int32, device=device)
    rows = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, mine)
    found = torch.stack(rows).tolist()
    return [[(high << 31) | low for high, low in zip(r[::2], r[1::2], strict=True)] for r in found]
