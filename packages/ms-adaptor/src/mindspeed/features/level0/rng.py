"""On the CPU the device generator is the host generator, which Megatron takes for an accident."""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from mindspeed.patching.records import Feature, Patch

if TYPE_CHECKING:
    import torch

_DEFAULT = "default-rng"

FEATURE = Feature(
    name="level0.rng",
    level=0,
    doc="The RNG tracker forks the CPU generator without a warning at every call.",
    patches=(
        Patch(
            target="megatron.core.tensor_parallel.random:CudaRNGStatesTracker.fork",
            kind="replace",
            value="mindspeed.features.level0.rng:fork",
            when="device == 'cpu'",
            reason="fork() warns whenever the host generator moved inside it; here the two "
            "are one generator and the warning would come with each dropout.",
        ),
    ),
)


@contextmanager
def fork(self: Any, name: str = "model-parallel-rng") -> Iterator[None]:
    """Draw from the stream ``name`` inside the context and from the outer stream after it.

    Nested forks of named streams keep what the inner ones drew. A stream that was loaded from
    another kind of device's checkpoint starts anew, with a warning.

    Raises:
        KeyError: no stream of that name was added.
        RuntimeError: the context was left inside another fork.
    """
    import torch

    if name not in self.states_:
        raise KeyError(f"cuda rng state {name} is not added")
    outer, outer_state = getattr(self, "_current_state_name", _DEFAULT), torch.get_rng_state()
    if outer != _DEFAULT:
        self.states_[outer] = outer_state
    _enter(name, self.states_[name])
    self._current_state_name = name
    try:
        yield
    finally:
        if self._current_state_name != name:
            raise RuntimeError(
                f"rng fork of {name!r} was left while {self._current_state_name!r} was current"
            )
        self.states_[name] = torch.get_rng_state()
        torch.set_rng_state(self.states_.get(outer, outer_state))
        self._current_state_name = outer


def _enter(name: str, state: torch.Tensor) -> None:
    import torch

    if state.numel() == torch.get_rng_state().numel():
        torch.set_rng_state(state)
        return
    warnings.warn(
        f"the random state of {name!r} comes from another kind of device and is skipped: the "
        "stream starts from its name",
        stacklevel=4,
    )
    torch.manual_seed(zlib.crc32(name.encode()))
