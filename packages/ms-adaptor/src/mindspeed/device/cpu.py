"""``torch.cuda`` as Megatron sees it on the CPU.

The host is one device without an index: :meth:`CpuRuntime.current_device` is a ``torch.device``,
never an int, because to torch an int names an accelerator. Streams and events order nothing since
the CPU runs in program order; events read the host clock. The device generator *is* the default
CPU generator. Memory figures are the process's resident set in bytes.
"""

from __future__ import annotations

import resource
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any, NoReturn

import psutil
import torch

from mindspeed.device.runtime import fall_through

_CPU = torch.device("cpu")
# Megatron asserts a compute capability of 8 for grouped matmul.
_CAPABILITY = (8, 0)


class Stream:
    """The CPU's only stream: all instances compare equal and every operation is already done."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream)

    def __hash__(self) -> int:
        return hash(Stream)

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *exc: object) -> None:
        return None

    def wait_stream(self, stream: Any) -> None:
        """Nothing to wait for."""

    def wait_event(self, event: Any) -> None:
        """Nothing to wait for."""

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def query(self) -> bool:
        """All work is done."""
        return True

    def record_event(self, event: Event | None = None) -> Event:
        """Record ``event`` (a new one by default) now and return it."""
        event = event or Event()
        event.record(self)
        return event


class Event:
    """A moment on the host's monotonic clock."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._time: float | None = None

    def record(self, stream: Any = None) -> None:
        """Take the time."""
        self._time = time.perf_counter()

    def wait(self, stream: Any = None) -> None:
        """Nothing to wait for."""

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def query(self) -> bool:
        """All work is done."""
        return True

    def elapsed_time(self, end: Event) -> float:
        """Milliseconds from this event to ``end``.

        Raises:
            RuntimeError: one of the two was never recorded.
        """
        if self._time is None or end._time is None:
            raise RuntimeError("elapsed_time: both events must be recorded first")
        return (end._time - self._time) * 1e3


class OutOfMemoryError(RuntimeError):
    """Stands for ``torch.cuda.OutOfMemoryError``; never raised by the CPU allocator."""


class _Generators:
    """``default_generators``: any index answers with the default CPU generator."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: Any) -> torch.Generator:
        return torch.default_generator

    def __iter__(self) -> Iterator[torch.Generator]:
        return iter((torch.default_generator,))


class _Over:
    """A submodule of ``torch.cuda`` with some names answered for the CPU."""

    def __init__(self, module: ModuleType, **names: Any) -> None:
        self._module = module
        vars(self).update(names)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


class CpuRuntime:
    """The names of ``torch.cuda`` that Megatron uses, answered for the CPU.

    Attributes:
        fallthrough: names taken from the real ``torch.cuda``, with the module that asked.
    """

    Stream = Stream
    ExternalStream = Stream
    Event = Event
    OutOfMemoryError = OutOfMemoryError
    FloatTensor = torch.FloatTensor
    HalfTensor = torch.HalfTensor
    BFloat16Tensor = torch.BFloat16Tensor
    LongTensor = torch.LongTensor
    default_generators = _Generators()

    def __init__(self) -> None:
        self.fallthrough: dict[str, str] = {}
        self.random = _Over(
            torch.cuda.random,
            get_rng_state=self.get_rng_state,
            set_rng_state=self.set_rng_state,
            manual_seed=self.manual_seed,
            initial_seed=self.initial_seed,
        )
        self.nvtx = _Over(
            torch.cuda.nvtx,
            range_push=_nothing,
            range_pop=_nothing,
            mark=_nothing,
            range=_no_range,
        )
        self.memory = _Over(
            torch.cuda.memory,
            _snapshot=_refuse("memory._snapshot", "--record-memory-history"),
            _record_memory_history=_refuse(
                "memory._record_memory_history", "--record-memory-history"
            ),
            mem_get_info=self.mem_get_info,
        )

    def __getattr__(self, name: str) -> Any:
        if name in _REFUSED:
            return _refuse(name, _REFUSED[name])
        return fall_through(self.fallthrough, name)

    # devices
    def is_available(self) -> bool:
        """True: Megatron's device is there."""
        return True

    is_initialized = is_available

    def is_bf16_supported(self, *args: Any) -> bool:
        """True: CPU kernels take bfloat16."""
        return True

    def init(self) -> None:
        """Nothing to initialise."""

    _lazy_init = init

    def _lazy_call(self, callback: Callable[[], Any], **kwargs: Any) -> None:
        # The real one only queues on a build without CUDA: the RNG state would never be set.
        callback()

    def current_device(self) -> torch.device:
        """The CPU."""
        return _CPU

    def device_count(self) -> int:
        """1: with 0, Megatron-LM skips the model-parallel initialisation without a word."""
        return 1

    def set_device(self, device: Any) -> None:
        """Nothing to choose."""

    @contextmanager
    def device(self, device: Any) -> Iterator[None]:
        """Nothing to choose."""
        yield

    def get_device_name(self, device: Any = None) -> str:
        """``"cpu"``."""
        return "cpu"

    def get_device_capability(self, device: Any = None) -> tuple[int, int]:
        """A compute capability that passes Megatron's own checks."""
        return _CAPABILITY

    def get_device_properties(self, device: Any = None) -> SimpleNamespace:
        """A record with the fields that Megatron reads."""
        return SimpleNamespace(
            name="cpu",
            major=_CAPABILITY[0],
            minor=_CAPABILITY[1],
            total_memory=psutil.virtual_memory().total,
            multi_processor_count=psutil.cpu_count() or 1,
        )

    # order
    def synchronize(self, device: Any = None) -> None:
        """Nothing to wait for."""

    def current_stream(self, device: Any = None) -> Any:
        """The only stream."""
        return Stream()

    default_stream = current_stream

    def set_stream(self, stream: Any) -> None:
        """Nothing to choose."""

    @contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        """Nothing to choose."""
        yield

    # random numbers
    def get_rng_state(self, device: Any = None) -> torch.Tensor:
        """State of the default CPU generator."""
        return torch.get_rng_state()

    def set_rng_state(self, state: torch.Tensor, device: Any = None) -> None:
        """Set the state of the default CPU generator; another device's state is skipped."""
        if state.numel() != torch.get_rng_state().numel():
            warnings.warn(
                f"a random state of {state.numel()} bytes comes from another kind of device and "
                "is skipped: random numbers go on from this run's seed",
                stacklevel=2,
            )
            return
        torch.set_rng_state(state)

    def manual_seed(self, seed: int) -> None:
        """Seed the default CPU generator."""
        torch.default_generator.manual_seed(int(seed))

    manual_seed_all = manual_seed

    def initial_seed(self) -> int:
        """Seed of the default CPU generator."""
        return torch.default_generator.initial_seed()

    # memory
    def empty_cache(self) -> None:
        """Nothing is cached."""

    ipc_collect = empty_cache

    def memory_allocated(self, device: Any = None) -> int:
        """Resident set of this process, bytes."""
        return int(psutil.Process().memory_info().rss)

    memory_reserved = device_memory_used = memory_allocated

    def max_memory_allocated(self, device: Any = None) -> int:
        """Largest resident set of this process so far, bytes."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return int(peak if sys.platform == "darwin" else peak * 1024)

    max_memory_reserved = max_memory_allocated

    def memory_stats(self, device: Any = None) -> dict[str, int]:
        """The resident set under the keys that Megatron logs; 0 for every other key."""
        stats: dict[str, int] = defaultdict(int)
        stats["allocated_bytes.all.current"] = self.memory_allocated()
        stats["allocated_bytes.all.peak"] = self.max_memory_allocated()
        return stats

    def reset_peak_memory_stats(self, device: Any = None) -> None:
        """The operating system keeps the peak of a process; it cannot be reset."""

    def mem_get_info(self, device: Any = None) -> tuple[int, int]:
        """Available and total memory of the machine, bytes."""
        memory = psutil.virtual_memory()
        return int(memory.available), int(memory.total)


_REFUSED = {
    "CUDAGraph": "--cuda-graph-impl",
    "graph": "--cuda-graph-impl",
    "graph_pool_handle": "--cuda-graph-impl",
    "make_graphed_callables": "--cuda-graph-impl",
    "cudart": "--profile",
    "check_error": "--profile",
    "MemPool": "--use-nccl-ub",
    "use_mem_pool": "--use-nccl-ub",
}


def _refuse(name: str, flag: str) -> Callable[..., NoReturn]:
    def refused(*args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(f"torch.cuda.{name} has no meaning on the CPU: turn {flag} off")

    refused.__name__ = refused.__qualname__ = name.rpartition(".")[2]
    return refused


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None


@contextmanager
def _no_range(*args: Any, **kwargs: Any) -> Iterator[None]:
    yield
