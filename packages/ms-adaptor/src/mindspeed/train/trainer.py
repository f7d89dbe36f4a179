"""One rank of a training job: the library that the command line and the tests share.

    config = TrainConfig.of(num_layers=4, tensor_model_parallel_size=2)
    with Trainer(config) as trainer:
        losses = [result.loss for result in trainer.run(10)]

Every rank builds its own `Trainer` with the same configuration; torch.distributed is initialised by
the caller, or by the trainer for a world of one. Results are equal on all ranks.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from mindspeed.features.profile import determinism
from mindspeed.features.profile.steps import StepHooks
from mindspeed.train import checkpoint, parallel
from mindspeed.train.batches import MicroBatches, SampleSource, SyntheticSamples
from mindspeed.train.config import TrainConfig
from mindspeed.train.level import activate_level
from mindspeed.train.measure import Measured, StepMeters
from mindspeed.train.model import Chunk, unwrap
from mindspeed.train.validate import ConfigError, check


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did, equal on every rank.

    Attributes:
        step: 1 for the first step of the job, also after a resume.
        loss: mean cross entropy per token of the global batch.
        grad_norm: norm of the whole gradient before clipping; nan when a step was skipped.
        lr: the rate this step was taken with.
        loss_scale: the fp16 loss scale, 1 otherwise.
        skipped: gradients overflowed, no parameter changed.
        tokens: tokens of the global batch.
        step_time_s: wall time of the slowest rank.
        measured: what this step cost, if it was measured.
        peak_bytes: highest memory of a rank's process or device so far.
        stop: some rank asked to stop at this step.
        notes: what profilers and meters have to say at this step.
    """

    step: int
    loss: float
    grad_norm: float
    lr: float
    loss_scale: float
    skipped: bool
    tokens: int
    step_time_s: float
    peak_bytes: int
    stop: bool
    notes: tuple[str, ...] = ()
    measured: Measured | None = None


class Trainer:
    """Model, optimizer, schedule and batches of one rank.

    Args:
        config: equal on every rank.
        source: training samples; counting sequences by default.
        valid_source: samples for `evaluate`; the training samples by default.

    Raises:
        ConfigError: the configuration does not fit the number of ranks.
        RuntimeError: another trainer is open in this process, or a deterministic run is asked for
            when process groups exist already.
    """

    _current: ClassVar[Trainer | None] = None

    def __init__(
        self,
        config: TrainConfig,
        source: SampleSource | None = None,
        valid_source: SampleSource | None = None,
    ) -> None:
        if Trainer._current is not None:
            # Refused before anything shared is touched: groups and patches belong to the other.
            raise RuntimeError("a Trainer is open in this process: close the other Trainer first")
        Trainer._current = self
        self._scope = ExitStack()
        self._owns_world = False
        self._handle: Any = None
        self._hooks = StepHooks(())
        self._open = False
        try:
            # Before groups are made: the libraries below them read their settings then.
            self._scope.enter_context(determinism.scope(config.plan_values()))
            self._owns_world = parallel.ensure_process_group(config.distributed_timeout)
            self.world_size = dist.get_world_size()
            check(config, self.world_size)
            self.config = config
            self._handle = activate_level(config)
            parallel.initialize(config)
            self._open = True
            self._build(source, valid_source)
        except BaseException:
            self.close()
            raise

    def _build(self, source: SampleSource | None, valid: SampleSource | None) -> None:
        from megatron.core import parallel_state

        from mindspeed.train.model import build_chunks, wrap_chunks
        from mindspeed.train.optim import build_optimizer, build_scheduler

        config = self.config
        self._hooks = _hooks(config, self.world_size)
        self.step_count = 0
        self._pending_save: checkpoint.PendingSave | None = None
        self.num_microbatches = config.num_microbatches(self.world_size)
        self.num_samples_per_step = config.global_batch_size(self.world_size)
        self.device = _device()
        bare = [chunk.to(self.device) for chunk in build_chunks(config)]
        self.chunks = wrap_chunks(config, bare)
        self.optimizer = build_optimizer(config, self.chunks)
        self.scheduler = build_scheduler(config, self.optimizer, self.num_samples_per_step)
        self._connect_schedule()
        source = source or SyntheticSamples(
            config.model.seq_length, config.model.vocab_size, config.seed
        )
        batches = partial(
            MicroBatches,
            micro_batch_size=config.batch.micro_batch_size,
            rank=parallel_state.get_data_parallel_rank(),
            copies=parallel_state.get_data_parallel_world_size(),
            device=self.device,
        )
        self._train_batches = batches(source)
        self._valid_batches = batches(valid if valid is not None else source)
        # One rank of each copy of the model reports its loss.
        self._reports_loss = (
            parallel_state.is_pipeline_last_stage(ignore_virtual=True)
            and parallel_state.get_tensor_model_parallel_rank() == 0
        )

    def _connect_schedule(self) -> None:
        """Hands the schedules the hooks they call on the optimizer and the wrappers."""
        from megatron.core.distributed import finalize_model_grads

        optim = self.config.optim
        core = self.chunks[0].config
        core.finalize_model_grads_func = finalize_model_grads
        core.grad_scale_func = self.optimizer.scale_loss

        def hooks(name: str) -> Any:
            methods = [getattr(chunk, name) for chunk in self.chunks]
            return methods if len(methods) > 1 else methods[0]

        if optim.overlap_grad_reduce:
            core.no_sync_func = hooks("no_sync")
            if optim.align_grad_reduce and len(self.chunks) > 1:
                core.grad_sync_func = hooks("start_grad_sync")
        if optim.overlap_param_gather and optim.align_param_gather and len(self.chunks) > 1:
            core.param_sync_func = hooks("start_param_sync")

    def run(
        self, steps: int, on_step: Callable[[StepResult], None] | None = None
    ) -> list[StepResult]:
        """Takes `steps` optimizer steps; fewer if a rank asks to stop.

        Args:
            steps: how many.
            on_step: called after each step, on every rank.
        """
        results = []
        for _ in range(steps):
            result = self.train_step()
            results.append(result)
            if on_step is not None:
                on_step(result)
            if result.stop:
                break
        return results

    def train_step(self, *, stop: bool = False, measure: bool = False) -> StepResult:
        """One optimizer step over the global batch.

        Args:
            stop: this rank wants to stop; every rank then sees `stop` in the same step's result.
            measure: find out what the step costs (`StepResult.measured`). The step takes longer and
                does the same; give it on every rank. Needs ms-profile.
        """
        from ms_profile.memory import peak_bytes

        meters = StepMeters([unwrap(c) for c in self.chunks], self.optimizer) if measure else None
        start = time.perf_counter()
        lr = self.optimizer.param_groups[0]["lr"]
        with self._hooks.step(self.step_count + 1), meters() if meters else nullcontext():
            for chunk in self.chunks:
                chunk.zero_grad_buffer()
            self.optimizer.zero_grad()
            first = self.step_count * self.num_microbatches
            reports = self._forward_backward(self._train_batches, first)
            loss_scale = float(self.optimizer.get_loss_scale())
            updated, grad_norm, _ = self.optimizer.step()
        if updated:
            self.scheduler.step(increment=self.num_samples_per_step)
        self.step_count += 1
        loss_sum, tokens = self._sums(reports)
        facts = self._gather(
            loss_sum,
            tokens,
            float(stop),
            time.perf_counter() - start,
            peak_bytes(self.device),
        )
        total = facts.sum(0).tolist()
        most = facts.amax(0).tolist()
        if self._pending_save is not None and self._pending_save.done():
            self._pending_save = None
        return StepResult(
            step=self.step_count,
            loss=total[0] / max(total[1], 1.0),
            grad_norm=math.nan if grad_norm is None else float(grad_norm),
            lr=float(lr),
            loss_scale=loss_scale,
            skipped=not updated,
            tokens=int(total[1]),
            step_time_s=most[3],
            peak_bytes=int(most[4]),
            stop=total[2] > 0,
            notes=(*self._notes(), *(self._memory_notes(meters) if meters else ())),
            measured=self._measured(meters) if meters else None,
        )

    def _measured(self, meters: StepMeters) -> Measured:
        largest = self._gather(*meters.largest()).amax(0).tolist()
        summed = self._gather(*meters.summed()).sum(0).tolist()
        saved, tensors, sent, sends = map(int, largest)
        model, hardware = map(int, summed)
        return Measured(saved, tensors, model, hardware, sent, sends, meters.peak_at)

    def memory_plan(self) -> Any:
        """What the memory planner decided for this rank (`Planned`), None without it."""
        found = sys.modules.get("mindspeed.features.memory.planner.schedule")
        return None if found is None else found.planned(self.chunks)

    def _memory_notes(self, meters: StepMeters) -> tuple[str, ...]:
        """What was planned beside what a measured step took, for each pipeline stage."""
        made = self.memory_plan()
        if made is None:
            return ()
        from mindspeed.features.memory.planner.report import compared

        plan = made.plan
        peak = meters.memory.peak.nbytes + made.workspaces  # which were there before the step
        rows = self._gather(made.stage, plan.budget, plan.peak, peak)
        return tuple(compared(rows.tolist()))

    def _notes(self) -> tuple[str, ...]:
        """Lines of the hooks, every `log_interval` steps and at the last one."""
        every, last = self.config.log_interval, self.config.train_iters
        due = self.step_count % every == 0 or self.step_count == last
        return tuple(self._hooks.lines(self.step_count)) if due else ()

    def evaluate(self, iters: int | None = None) -> float:
        """Mean cross entropy per token of the first `iters` validation batches.

        Args:
            iters: global batches to read; `eval_iters` of the configuration by default.
        """
        iters = self.config.batch.eval_iters if iters is None else iters
        for chunk in self.chunks:
            chunk.eval()
        loss_sum = tokens = 0.0
        with self.whole_parameters(), torch.no_grad():
            for index in range(iters):
                start = index * self.num_microbatches
                reports = self._forward_backward(self._valid_batches, start, forward_only=True)
                sums = self._sums(reports)
                loss_sum, tokens = loss_sum + sums[0], tokens + sums[1]
        for chunk in self.chunks:
            chunk.train()
        total = self._gather(loss_sum, tokens).sum(0).tolist()
        return float(total[0] / max(total[1], 1.0))

    def _forward_backward(
        self, batches: MicroBatches, start: int, forward_only: bool = False
    ) -> list[dict[str, Tensor]]:
        from megatron.core.pipeline_parallel import get_forward_backward_func

        iterators: list[Iterator[Any]] = [batches.iterate(start) for _ in self.chunks]
        reports: list[dict[str, Tensor]] = get_forward_backward_func()(
            forward_step_func=_forward_step,
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=self.chunks if len(self.chunks) > 1 else self.chunks[0],
            num_microbatches=self.num_microbatches,
            seq_length=self.config.model.seq_length,
            micro_batch_size=self.config.batch.micro_batch_size,
            forward_only=forward_only,
        )
        return reports

    def _sums(self, reports: list[dict[str, Tensor]]) -> tuple[float, float]:
        if not self._reports_loss:
            return 0.0, 0.0
        both = torch.stack([report["lm loss"] for report in reports]).double().sum(0)
        return float(both[0]), float(both[1])

    def _gather(self, *values: float) -> Tensor:
        """All ranks' values, [world_size, len(values)], in double precision on the host."""
        mine = torch.tensor(values, dtype=torch.float64, device=_collective_device())
        rows = [torch.empty_like(mine) for _ in range(self.world_size)]
        dist.all_gather(rows, mine)
        return torch.stack(rows).cpu()

    @contextmanager
    def whole_parameters(self) -> Iterator[None]:
        """Inside, parameters are complete: an overlapped gather is finished and held back."""
        hooked = self.config.optim.overlap_param_gather
        for chunk in self.chunks if hooked else ():
            chunk.disable_forward_pre_hook()
        yield
        for chunk in self.chunks if hooked else ():
            chunk.enable_forward_pre_hook()

    def parameters(self) -> dict[str, Tensor]:
        """This rank's parameters by name, as they are now (views)."""
        out = {}
        for index, chunk in enumerate(self.chunks):
            prefix = f"{index}." if len(self.chunks) > 1 else ""
            for name, parameter in unwrap(chunk).named_parameters():
                out[prefix + name] = parameter.detach()
        return out

    def save(self, folder: str | Path, *, asynchronous: bool = False) -> Path:
        """Writes a complete checkpoint below `folder`; call it on every rank.

        Args:
            folder: holds one sub-folder for each saved step.
            asynchronous: return at once and write in another process; the checkpoint appears
                under its name when complete, at a later step or at `close`.

        Returns:
            The folder of this checkpoint.
        """
        self.finish_save()
        with self.whole_parameters():
            pending = checkpoint.save(self, Path(folder), asynchronous=asynchronous)
        self._pending_save = pending if asynchronous else None
        return pending.path

    def finish_save(self) -> None:
        """Waits for an asynchronous save."""
        if self._pending_save is not None:
            self._pending_save.done(wait=True)
            self._pending_save = None

    def load(self, folder: str | Path, *, reshard: bool = False) -> int:
        """Continues from the newest checkpoint in `folder`, or from a checkpoint itself.

        Args:
            folder: what `save` got or what it returned.
            reshard: allow another number of ranks or another split of the model; random states
                then start anew from the seed.

        Returns:
            The step it continues from.

        Raises:
            CheckpointError: nothing readable there, or it does not fit and `reshard` is off.
        """
        with self.whole_parameters() if self.step_count else nullcontext():
            self.step_count = checkpoint.load(self, Path(folder), reshard=reshard)
        return self.step_count

    def close(self) -> None:
        """Ends asynchronous saves, removes Megatron's groups and undoes the level's patches."""
        if Trainer._current is self:
            Trainer._current = None
        self._hooks.close()
        if self._open:
            self._open = False
            self.finish_save()
            parallel.destroy()
        if self._handle is not None:
            self._handle.undo()
            self._handle = None
        if self._owns_world and dist.is_initialized():
            self._owns_world = False
            dist.destroy_process_group()
        self._scope.close()

    def __enter__(self) -> Trainer:
        return self

    def __exit__(self, *exc: object) -> None:
        if exc[0] is not None:
            # The other ranks may be gone: waiting for them would hide the error.
            self._pending_save = None
        self.close()


def _forward_step(iterator: Iterator[dict[str, Tensor]], model: Chunk) -> Any:
    from megatron.core.parallel_state import get_context_parallel_world_size
    from megatron.core.utils import get_batch_on_this_cp_rank

    whole = next(iterator)
    batch = get_batch_on_this_cp_rank(dict(whole))
    # No mask is passed: the causal one belongs to the layer, and a kernel may never build it.
    losses = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
    tokens = whole["loss_mask"].sum()
    return losses, partial(_loss, batch["loss_mask"], tokens, get_context_parallel_world_size())


def _loss(
    loss_mask: Tensor, tokens: Tensor, parts: int, losses: Tensor
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Sum over this rank's tokens, and the count of all; the schedule divides.

    Gradients are averaged over the ranks that share a sequence: each takes part `parts` times.
    """
    mask = loss_mask.reshape(-1).float()
    loss = torch.sum(losses.reshape(-1).float() * mask)
    report = torch.stack([loss.detach(), mask.sum()])
    return loss * parts, tokens.detach().clone().to(torch.int), {"lm loss": report}


def _hooks(config: TrainConfig, world_size: int) -> StepHooks:
    try:
        return StepHooks.of(config.plan_values(), dist.get_rank(), world_size)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _device() -> torch.device:
    from mindspeed import device

    descriptor = device.current()
    if descriptor is None or descriptor.type == "cpu":
        return torch.device("cpu")
    return torch.device(descriptor.type, torch.accelerator.current_device_index())


def _collective_device() -> torch.device:
    return torch.device("cpu") if dist.get_backend() == "gloo" else _device()
