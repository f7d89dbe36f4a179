"""One real micro-step of a model chunk, and all that it touches put back."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from mindspeed.features.memory.planner.batches import Batches
from ms_memory.planner.measure import record


class MicroStep:
    """Forward and backward of a chunk's first micro-batch, by Megatron's own functions.

    Nothing is sent: a chunk that is not the first takes what its first micro-batch brought, and one
    that is not the last gets ones for the gradient of its output.

    Args:
        call: arguments of the schedule.
        batches: its data.
        chunks: all of this rank.
        number: which of them.
        inputs: what it received; one None at the beginning of the pipeline.

    Attributes:
        chunk: the one that runs.
    """

    def __init__(
        self,
        call: dict[str, Any],
        batches: Batches,
        chunks: Sequence[Any],
        number: int,
        inputs: list[Tensor | None],
    ) -> None:
        from megatron.core import parallel_state
        from megatron.core.utils import get_model_config, get_model_type

        self._call, self._batches = call, batches
        self.chunk, self._number = chunks[number], number
        self._inputs = inputs
        self._config = get_model_config(self.chunk)
        self._type = get_model_type(self.chunk)
        self._stage = number if len(chunks) > 1 else None
        end = parallel_state.is_pipeline_last_stage(ignore_virtual=True)
        self._last = end and number == len(chunks) - 1
        self._parts = parallel_state.get_context_parallel_world_size()

    def __call__(self) -> None:
        """Run it; gradients go where they go in training, and no rank is told of them."""
        from megatron.core.pipeline_parallel import schedules

        config = self._config
        received = [None if x is None else x.clone().requires_grad_() for x in self._inputs]
        no_sync = getattr(self.chunk, "no_sync", contextlib.nullcontext)
        with no_sync():
            outputs, _ = schedules.forward_step(
                self._call["forward_step_func"],
                self._batches.of(self._number),
                self.chunk,
                self._call["num_microbatches"],
                received,
                [],
                config,
                self._parts,
                current_microbatch=0,
                vp_stage=self._stage,
                is_last_stage=self._last,
            )
            grads = [None if self._last else torch.ones_like(out) for out in outputs]
            if not self._last:
                for out in outputs:
                    schedules.deallocate_output_tensor(out, config.deallocate_pipeline_outputs)
            schedules.backward_step(received, outputs, grads, self._type, config)


def left_behind(step: MicroStep) -> int:
    """Return the bytes of the workspaces and caches that a first micro-step makes, and keeps."""
    model = unwrapped(step.chunk)
    phases = record(model, step, (), time.perf_counter_ns, count=True)
    # Without Megatron's wrapper the gradients are left as well.
    return phases[-1].start - phases[0].start if gradient_buffers(step.chunk) else 0


def received(
    schedule: Callable[..., Any], call: dict[str, Any], batches: Batches, chunks: Sequence[Any]
) -> list[list[Tensor | None]]:
    """Return what each chunk of this rank receives with its first micro-batch.

    Runs the pipeline forward, without gradients, on as few micro-batches as it takes.
    """
    from megatron.core import parallel_state
    from megatron.core.utils import get_model_config

    stages = parallel_state.get_pipeline_model_parallel_world_size()
    if stages == 1:
        return [[None] for _ in chunks]
    group = getattr(get_model_config(chunks[0]), "microbatch_group_size_per_vp_stage", None)
    fewest = (group or stages) if len(chunks) > 1 else 1
    found: list[list[Tensor | None]] = [[] for _ in chunks]
    with contextlib.ExitStack() as stack:
        for chunk, kept in zip(chunks, found, strict=True):
            stack.enter_context(_listening(unwrapped(chunk), kept))
        stack.enter_context(torch.no_grad())
        schedule(
            **{
                **call,
                "data_iterator": batches.measured(),
                "num_microbatches": min(fewest, call["num_microbatches"]),
                "forward_only": True,
            }
        )
    return found


@contextlib.contextmanager
def _listening(model: Any, kept: list[Tensor | None]) -> Iterator[None]:
    """Within, keep what the schedule hands a chunk first."""

    def keep(module: Any, args: Any) -> None:
        if not kept:
            found = module.decoder.input_tensor
            kept.append(None if found is None else found.detach().clone())

    handle = model.register_forward_pre_hook(keep)
    try:
        yield
    finally:
        handle.remove()


def unwrapped(chunk: Any) -> Any:
    """Return the model inside the data-parallel and low-precision wrappers."""
    while hasattr(chunk, "module"):
        chunk = chunk.module
    return chunk


@contextlib.contextmanager
def as_found(chunks: Sequence[Any]) -> Iterator[None]:
    """Put back random states, buffers, gradients and the losses that Megatron gathers for logs."""
    puts = [*_random_states(), *_logs()]
    for chunk in chunks:
        puts += [*_buffers(chunk), *_gradients(chunk)]
    try:
        yield
    finally:
        with torch.no_grad():
            for put in puts:
                put()


Put = Callable[[], object]


def _random_states() -> Iterator[Put]:
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    state = torch.get_rng_state()
    yield lambda: torch.set_rng_state(state)
    if torch.accelerator.is_available():
        module = torch.get_device_module(torch.accelerator.current_accelerator())
        of_device = module.get_rng_state()
        yield lambda: module.set_rng_state(of_device)
    tracker = get_cuda_rng_tracker()
    named = {name: s.clone() for name, s in tracker.get_states().items()}
    yield lambda: tracker.set_states(named)


def _logs() -> Iterator[Put]:
    from megatron.core.transformer.moe import moe_utils
    from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper

    for log in (moe_utils.get_moe_layer_wise_logging_tracker(), MTPLossLoggingHelper.tracker):
        yield _refill(log, {key: _copy(value) for key, value in log.items()})


def _copy(value: Any) -> Any:
    """Copy tensors and dictionaries; process groups stay what they are."""
    if isinstance(value, dict):
        return {key: _copy(one) for key, one in value.items()}
    return value.clone() if isinstance(value, Tensor) else value


def _refill(log: dict[str, Any], found: dict[str, Any]) -> Put:
    def put() -> None:
        log.clear()
        log.update(found)

    return put


def _buffers(chunk: Any) -> Iterator[Put]:
    for buffer in unwrapped(chunk).buffers():
        yield _put_tensor(buffer, buffer.clone())


def _gradients(chunk: Any) -> Iterator[Put]:
    for parameter in chunk.parameters():
        yield _put_gradient(parameter, parameter.grad)
        if hasattr(parameter, "grad_added_to_main_grad"):
            yield _put_flag(parameter, parameter.grad_added_to_main_grad)
    for grads in gradient_buffers(chunk):
        # As a rule a step begins with zeros, which need no copy.
        yield _put_tensor(grads, grads.clone()) if grads.any() else grads.zero_


def gradient_buffers(chunk: Any) -> list[Tensor]:
    """Return the flat gradients of Megatron's data-parallel wrapper; none without it."""
    names = ("buffers", "expert_parallel_buffers")
    lists = [getattr(chunk, name, ()) for name in names]
    return [b.grad_data for one in lists if isinstance(one, list) for b in one]


def _put_tensor(tensor: Tensor, found: Tensor) -> Put:
    return lambda: tensor.copy_(found)


def _put_gradient(parameter: Any, found: Tensor | None) -> Put:
    def put() -> None:
        parameter.grad = found

    return put


def _put_flag(parameter: Any, found: bool) -> Put:
    def put() -> None:
        parameter.grad_added_to_main_grad = found

    return put
