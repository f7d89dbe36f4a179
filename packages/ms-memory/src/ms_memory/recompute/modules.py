"""Compute whole modules again: any modules by name, a whole call or chosen operators."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.utils import checkpoint as torch_checkpoint

from .discard import make_replay
from .match import Plan, matched
from .offload import Offloading
from .region import Region

if TYPE_CHECKING:
    from ..session import Session

FEATURE = "recompute.modules"
Granularity = Literal["region", "sac"]
Method = Literal["block", "uniform"]


def modules(
    session: Session,
    plan: Plan,
    *,
    granularity: Granularity = "region",
    policy: Callable[..., Any] | None = None,
    offload_inputs: bool = False,
    min_bytes: int = 524_288,
    early_stop: bool = True,
) -> list[str]:
    """Drop what modules save inside, and compute it again in the backward.

    Keeps the inputs alone, w sbh a transformer layer, for one more forward of the module.

    Args:
        session: of the model.
        plan: names with wildcards, or a function of name and module.
        granularity: "region" computes all again; "sac" what `policy` says.
        policy: with "sac", as for `torch.utils.checkpoint.create_selective_checkpoint_contexts`: a
            list of operators whose results are kept, or a function that returns a
            `CheckpointPolicy`; where that is `MUST_CPU_OFFLOAD`, the operator's result waits on the
            host, and is not computed again.
        offload_inputs: let the inputs wait on the host, but those of the last module, whose
            backward follows at once; then nothing stays on the device between the two runs.
        min_bytes: inputs below stay.
        early_stop: end the second run after the last tensor that the backward needs.

    Returns:
        The paths of what was found.

    Raises:
        MemoryFeatureError: E-M22, a name matches nothing; E-M10 and E-M05, see `Session.claim`.
        RuntimeError: inputs, or in the forward results, to offload while the model is on the
            processor; a result on its way to the host is written in place.
        ValueError: an unknown granularity, "sac" without a policy, or a policy without "sac".
    """
    if granularity not in ("region", "sac"):
        raise ValueError(f"modules: granularity: got {granularity!r}, need 'region' or 'sac'")
    if (granularity == "sac") != (policy is not None):
        raise ValueError("modules: policy: got one or none, need one with granularity='sac' alone")
    found = matched(session.model, plan)
    for _, module in found:
        session.claim(module, FEATURE, granularity, region=True)
    names = [name for name, _ in found]
    offloading = Offloading(session, names) if callable(policy) else None
    for name, module in found:
        contexts = functools.partial(_contexts, policy, offloading, name)
        session.wrap(module, functools.partial(_again, session, contexts, early_stop))
    if offload_inputs:
        from ..swap.modules import inside, install

        install(session, names, inside(names[:-1], min_bytes))
    return names


def _again(
    session: Session,
    contexts: Callable[[], tuple[Any, Any]],
    early_stop: bool,
    original: Callable[..., Any],
) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return original(*args, **kwargs)
        tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
        replay = make_replay(tensors, session.sources, "auto", "replay")
        region = Region(original, replay, contexts=contexts(), early_stop=early_stop)
        return region.run(*args, **kwargs)

    return forward


def _contexts(policy: Any, offloading: Offloading | None, name: str) -> tuple[Any, Any]:
    if policy is None:
        return contextlib.nullcontext(), contextlib.nullcontext()
    if offloading is None:
        return torch_checkpoint.create_selective_checkpoint_contexts(policy)  # type: ignore[no-any-return]
    return offloading.contexts(policy, name)


def segments(layers: int, method: Method, size: int) -> list[range]:
    """Return the runs of layers that are recomputed together.

    Args:
        layers: of the chunk.
        method: "uniform" cuts all layers into runs of `size`, the last one shorter; "block" takes
            each of the first `size` layers by itself and leaves the rest alone.
        size: layers of a run, or number of runs.

    Raises:
        ValueError: an unknown method, or a number out of range.
    """
    if method == "uniform":
        if size < 1:
            raise ValueError(f"segments: size: got {size}, need 1 or more")
        return [range(i, min(i + size, layers)) for i in range(0, layers, size)]
    if method != "block":
        raise ValueError(f"segments: method: got {method!r}, need 'block' or 'uniform'")
    if not 0 <= size <= layers:
        raise ValueError(f"segments: size: got {size}, need 0 to {layers}")
    return [range(i, i + 1) for i in range(size)]
