"""Names of plans: for compiled code, which holds strings, and to compare the plans of ranks."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

import torch

from .plan import AttnPlan
from .show import plan_digests
from .transport import all_gather_flat

if TYPE_CHECKING:
    from .topology import CPTopology

BYTES = 16
_PLANS: WeakValueDictionary[str, AttnPlan] = WeakValueDictionary()
_KEY = "_context_key"


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def plan_key(plan: AttnPlan) -> str:
    """Return the name of a plan: equal plans have the same name in every process."""
    known: str | None = plan.__dict__.get(_KEY)
    if known is None:
        joined = "".join(plan_digests(plan).values())
        known = f"{plan.algorithm}-{hashlib.sha256(joined.encode()).hexdigest()[: 2 * BYTES]}"
        object.__setattr__(plan, _KEY, known)
    _PLANS[known] = plan
    return known


def plan_of(key: str) -> AttnPlan:
    """Return the plan that has this name in this process.

    Raises:
        KeyError: it was never named, or nobody holds it any more.
    """
    plan = _PLANS.get(key)
    if plan is None:
        raise KeyError(f"no living plan of this process has the key {key!r}: keep a reference")
    return plan


def check_plans(plan: AttnPlan, topology: CPTopology, device: torch.device) -> None:
    """Check that all ranks of a topology have the same plan; once a plan.

    Args:
        plan: this rank's.
        topology: the ranks.
        device: where tensors for their collectives live.

    Raises:
        ValueError: at every rank, naming the fields that differ and the ranks.
    """
    key = plan_key(plan)
    if key in topology.checked:
        return
    mine = {name: bytes.fromhex(text)[:BYTES] for name, text in plan_digests(plan).items()}
    own = torch.tensor(list(b"".join(mine.values())), dtype=torch.uint8, device=device)
    every = own.new_empty(topology.size, own.numel())
    all_gather_flat(every.view(-1), own, group=topology.group)
    digests = every.cpu().view(topology.size, len(mine), BYTES)
    differ = (digests != digests[0]).any(-1)
    if differ.any():
        found = {
            name: differ[:, i].nonzero().flatten().tolist()
            for i, name in enumerate(mine)
            if differ[:, i].any()
        }
        text = ", ".join(f"{name} at ranks {ranks}" for name, ranks in found.items())
        raise ValueError(
            f"context_attention: plan: got other plans than rank 0's ({text}), need one plan at"
            " all ranks: make it from the same layout, mask and options"
        )
    topology.checked.add(key)


__all__ = ["check_plans", "plan_key", "plan_of"]
