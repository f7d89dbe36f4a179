"""What the flags of context parallelism ask for; read by the model, written into its config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Algorithm = Literal["ring", "ulysses", "usp", "allgather_kv", "tasks"]
Keep = Literal["last", "k", "kv", "pre", "pre_k"]

# Value of --context-parallel-algo -> algorithm of ms_parallel.context.
ALGORITHMS: dict[str, Algorithm] = {
    "ulysses_cp_algo": "ulysses",
    "megatron_cp_algo": "ring",
    "hybrid_cp_algo": "usp",
    "adaptive_cp_algo": "tasks",
    "hybrid_adaptive_cp_algo": "tasks",
    "kvallgather_cp_algo": "allgather_kv",
}
HYBRID = ("hybrid_cp_algo", "hybrid_adaptive_cp_algo")
RINGS = ("megatron_cp_algo", "hybrid_cp_algo")
# Value of --context-parallel-kv-cache-policy -> what stays between nodes, and inside one.
_KEEPS: dict[str | None, Keep] = {None: "last", "half": "k", "full": "kv"}
_BEFORE: dict[str | None, Keep] = {None: "last", "half": "pre_k", "full": "pre"}


@dataclass(frozen=True)
class ContextSettings:
    """How attention is divided, for every size of group and every layer.

    Attributes:
        algorithm: of `ms_parallel.context.plan_attention`.
        ulysses: U of the hybrid algorithms, 1 for the others.
        window: nodes of an inner ring.
        p2p: "dual_group" sends and receives on two groups.
        kv_keep: what the layers that keep more than they must keep for backward.
        interval: how many layers lie between two of those.
        check_plans: compare plans between ranks at their first use.
    """

    algorithm: Algorithm = "ulysses"
    ulysses: int = 1
    window: int = 1
    p2p: Literal["batched", "dual_group"] = "batched"
    kv_keep: Keep = "last"
    interval: int = 0
    check_plans: bool = False

    def arguments(self, size: int, layer: int = 1) -> dict[str, Any]:
        """Return what `plan_attention` takes beside layout, mask and heads.

        Args:
            size: ranks of the group: those of the flags, or of a group that comes with a batch.
                What is too large for a small group shrinks with it.
            layer: number of the layer in the whole model, from 1.
        """
        ulysses = size if self.algorithm == "ulysses" else min(self.ulysses, size)
        nodes = size // ulysses
        algorithm: Algorithm = "ulysses" if nodes == 1 else self.algorithm
        window = self.window if self.window < nodes and algorithm in ("ring", "usp") else 1
        return {
            "algorithm": algorithm,
            "ulysses": ulysses,
            "window": window,
            "kv_keep": self._keep(nodes, layer),
        }

    def _keep(self, nodes: int, layer: int) -> Keep:
        keeps = self.interval == 0 or layer % (self.interval + 1) == 1
        # Between nodes keys and values are kept as they arrive, inside one as they were before.
        fits = (self.kv_keep in _BEFORE.values()) == (nodes == 1)
        return self.kv_keep if keeps and fits else "last"


def settings(values: Mapping[str, Any]) -> ContextSettings | None:
    """Return what the arguments ask for, None for sequences that are not divided.

    Args:
        values: arguments by name; absent ones are at their defaults.
    """
    if values.get("context_parallel_size", 1) == 1:
        return None
    name = values.get("context_parallel_algo", "ulysses_cp_algo")
    keeps = _BEFORE if name == "ulysses_cp_algo" else _KEEPS
    hybrid = values.get("ulysses_degree_in_cp") if name in HYBRID else None
    return ContextSettings(
        ALGORITHMS[name],
        hybrid or 1,
        values.get("cp_window_size", 1),
        "dual_group" if values.get("use_cp_send_recv_overlap") else "batched",
        keeps[values.get("context_parallel_kv_cache_policy")],
        values.get("context_parallel_cache_interval", 0),
        bool(values.get("context_parallel_check_plans", False)),
    )


def mark(config: Any, values: Mapping[str, Any]) -> None:
    """Tell a configuration of Megatron's how attention is divided, where it is.

    Args:
        config: its attribute `context_attention` is set.
        values: arguments by name.
    """
    found = settings(values)
    if found is not None:
        config.context_attention = found


def is_local(values: Mapping[str, Any]) -> bool:
    """Whether layers are Megatron's own, and not TransformerEngine's.

    Args:
        values: arguments by name.
    """
    return bool(values.get("transformer_impl", "local") == "local")
