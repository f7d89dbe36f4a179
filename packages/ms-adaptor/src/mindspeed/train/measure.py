"""What one optimizer step costs: memory, FLOPs and communication, by the meters of ms-profile."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Measured:
    """One step of all ranks, equal on every rank.

    Attributes:
        saved_bytes: most bytes kept for backward at one time, on the rank with most.
        tensor_bytes: most bytes of live tensors at one time, weights, gradients and states
            included, on the rank with most.
        model_flops: forward and backward of all ranks, with whole squares of attention scores, so
            that levels which skip the masked half and levels which do not have the same number.
        hardware_flops: the same with recomputation.
        sent_bytes: what the rank that sends most sends to others.
        sends: communications between ranks, of the rank that issues most.
        peak_at: module and phase in which rank 0 had most live tensors.
    """

    saved_bytes: int
    tensor_bytes: int
    model_flops: int
    hardware_flops: int
    sent_bytes: int
    sends: int
    peak_at: str


class StepMeters:
    """The meters of one step of one rank.

    A meter that fails is logged and leaves zeros; the step is not disturbed.

    Args:
        chunks: the modules without wrappers.
        optimizer: Megatron's optimizer, whose states count.
    """

    def __init__(self, chunks: Sequence[nn.Module], optimizer: Any) -> None:
        from ms_profile import CommMeter, FlopMeter, MemoryMeter

        self.flops = FlopMeter(attention="full", unknown="warn", by_module=False)
        self.comm = CommMeter()
        self.memory = MemoryMeter(*chunks, *_torch_optimizers(optimizer))
        self._all = (self.flops, self.comm, self.memory)
        for meter in self._all:
            meter.tolerant = True

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Meters what runs inside."""
        with ExitStack() as stack:
            for meter in self._all:
                stack.enter_context(meter)
            yield

    def largest(self) -> tuple[int, ...]:
        """Numbers of which the largest rank's counts: kept, alive, sent, communications."""
        well = self.memory.failure is None
        # Groups of one rank call as well, and send nothing.
        calls = () if self.comm.failure else self.comm.calls
        sent = [call for call in calls if len(call.ranks) > 1]
        return (
            self.memory.saved_peak if well else 0,
            self.memory.peak.nbytes if well else 0,
            sum(call.wire_bytes for call in sent),
            len(sent),
        )

    def summed(self) -> tuple[int, ...]:
        """Numbers that add up over ranks: FLOPs of the model, with recomputation."""
        counts = self.flops.counts
        return (0, 0) if self.flops.failure else (counts.model, counts.hardware)

    @property
    def peak_at(self) -> str:
        """Module and phase of the peak, of this rank."""
        if self.memory.failure is not None:
            return ""
        peak = self.memory.peak
        return f"{peak.phase} of {peak.module}" if peak.module else peak.phase


def _torch_optimizers(optimizer: Any) -> Iterator[Any]:
    for each in getattr(optimizer, "chained_optimizers", [optimizer]):
        inner = getattr(each, "optimizer", None)
        if inner is not None and hasattr(inner, "state"):
            yield inner
