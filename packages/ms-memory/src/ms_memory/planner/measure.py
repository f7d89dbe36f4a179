"""One step under the census of storages: what is alive, and for how long, at every layer."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..ledger import StorageCensus
from ..recompute.replay import Source, copied, default_sources

Clock = Callable[[], int]


@dataclass(frozen=True)
class Phase:
    """What happened from one mark of a step to the next.

    Attributes:
        name: "begin", "forward NAME", "after NAME", "backward NAME", "end".
        start: bytes alive when it began.
        peak: most bytes alive.
        time: nanoseconds.
    """

    name: str
    start: int
    peak: int
    time: int


class Recorder:
    """Cuts a step into phases where layers begin and end.

    Args:
        model: whose layers.
        layers: dotted paths, each called once a step, in the order of forward.
        clock: returns nanoseconds.
        census: counts bytes; None: only time is taken.
        turn: called when the last layer's forward has ended.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[str],
        clock: Clock,
        census: StorageCensus | None,
        turn: Callable[[], object] | None = None,
    ) -> None:
        self.phases: list[Phase] = []
        self._model, self._layers = model, layers
        self._turn = turn
        self._clock, self._census = clock, census
        self._open: tuple[str, int, int] | None = None
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self._wait = _nothing if device.type == "cpu" else torch.accelerator.synchronize

    def mark(self, name: str) -> None:
        """End the phase that runs, and begin another."""
        self._wait()
        now, alive, peak = self._clock(), 0, 0
        if self._census is not None:
            alive = self._census.sweep()
            peak = self._census.peak
            self._census.reset_peak()
        if self._open is not None:
            before, start, began = self._open
            self.phases.append(Phase(before, start, peak, now - began))
        self._open = name, alive, self._clock()

    @contextlib.contextmanager
    def hooks(self) -> Iterator[None]:
        """Within, the layers of the model mark."""
        handles = []
        for name in self._layers:
            module = self._model.get_submodule(name)
            handles.append(module.register_forward_pre_hook(self._enter(name), with_kwargs=True))
            # Before those of a plan, which may start copies when a layer's backward begins; its
            # forward ends after theirs.
            first = module.register_forward_hook(self._watch(name), prepend=True)
            handles += [first, module.register_forward_hook(self._leave(name))]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, name: str) -> Callable[[nn.Module, object, object], None]:
        first = name == self._layers[0]

        def enter(module: nn.Module, args: object, kwargs: object) -> None:
            if first:
                for tensor in _differentiable((args, kwargs))[:1]:
                    tensor.register_hook(lambda _: self.mark("end"))
            self.mark(f"forward {name}")

        return enter

    def _watch(self, name: str) -> Callable[[nn.Module, object, object], None]:
        def watch(module: nn.Module, args: object, out: object) -> None:
            for tensor in _differentiable(out)[:1]:
                tensor.register_hook(lambda _: self.mark(f"backward {name}"))

        return watch

    def _leave(self, name: str) -> Callable[[nn.Module, object, object], None]:
        last = name == self._layers[-1]

        def leave(module: nn.Module, args: object, out: object) -> None:
            self.mark(f"after {name}")
            if last and self._turn is not None:
                self._turn()

        return leave


def record(
    model: nn.Module,
    step: Callable[[], object],
    layers: Sequence[str],
    clock: Clock,
    *,
    count: bool,
    sources: Sequence[Source] | None = None,
    turn: Callable[[], object] | None = None,
) -> list[Phase]:
    """Run a step as if it had not been: random states, buffers and gradients are as before.

    Args:
        model: whose layers are followed.
        step: runs forward, and backward too unless it returns a loss.
        layers: paths of layers.
        clock: returns nanoseconds.
        count: bytes are counted, which makes the step slow; otherwise only time is taken.
        sources: get and set of the random states; None: torch's own.
        turn: called when the last layer's forward has ended.
    """
    where = next((p.device for p in model.parameters()), torch.device("cpu"))
    with _as_found(model, default_sources(where) if sources is None else sources):
        census = StorageCensus(_state(model), where.type) if count else None
        recorder = Recorder(model, layers, clock, census, turn)
        with contextlib.ExitStack() as stack:
            stack.enter_context(recorder.hooks())
            if census is not None:
                # A function that is first traced under the census would stay eager for good.
                stack.enter_context(torch.compiler.set_stance("force_eager"))
                stack.enter_context(census)
            recorder.mark("begin")
            loss = step()
            if isinstance(loss, Tensor) and loss.requires_grad:
                loss.backward()
            del loss
            recorder.mark("done")
        left = census.nbytes if census is not None else 0
        return [*recorder.phases, Phase("optimizer step", left, left, 0)]


@contextlib.contextmanager
def _as_found(model: nn.Module, sources: Sequence[Source]) -> Iterator[None]:
    states = [(put, copied(get())) for get, put in sources]
    buffers = [(b, b.clone()) for b in model.buffers()]
    grads = [(p, p.grad) for p in model.parameters()]
    for parameter, _ in grads:
        parameter.grad = None
    try:
        yield
    finally:
        for put, state in states:
            put(state)
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
        for parameter, grad in grads:
            parameter.grad = grad


def _nothing() -> None:
    return None


def _state(model: nn.Module) -> list[Tensor]:
    return [t.detach() for t in (*model.parameters(), *model.buffers())]


def _differentiable(tree: object) -> list[Tensor]:
    return [t for t in tree_leaves(tree) if isinstance(t, Tensor) and t.requires_grad]
