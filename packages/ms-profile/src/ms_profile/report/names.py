"""What the names in traces stand for."""

from __future__ import annotations

from typing import Literal

Kind = Literal["compute", "communication", "copy", "other"]

# As the back ends spell them, without case and underscores; the longest first.
_COLLECTIVES = {
    "reducescatter": "reduce_scatter",
    "allreduce": "all_reduce",
    "allgather": "all_gather",
    "alltoall": "all_to_all",
    "broadcast": "broadcast",
    "barrier": "barrier",
    "scatter": "scatter",
    "gather": "gather",
    "reduce": "reduce",
    "send": "send",
    "recv": "recv",
}
_BACKENDS = ("gloo:", "nccl:", "hccl:", "xccl:", "mpi:", "ucc:")
_DISPATCHED = ("c10d::", "_c10d_functional::", "c10d_functional::", "record_param_comms")
# Rows that torch writes around Python code that handles an operator.
_PYTHON = ("PythonDispatchMode", "PythonSubclass", "PythonTLSSnapshot", "Pregraph bytecode")
_COPIES = frozenset({"aten::copy_", "aten::_foreach_copy_", "aten::_copy_from"})


def collective(name: str) -> str:
    """The common name of a communication: `nccl:_all_gather_base` is an `all_gather`."""
    plain = name.rsplit(":", 1)[-1].lower().replace("_", "").replace("-", "")
    for spelled, common in _COLLECTIVES.items():
        if spelled in plain:
            return common
    return name


def carries_out(name: str) -> bool:
    """Whether a range on the host is the back end at work, not the call that asks for it."""
    return name.startswith(_BACKENDS)


def labelled(name: str) -> tuple[str, str] | None:
    """Operation and group of a row `all_reduce [dp]` that names the group, as ours do."""
    op, _, group = name.partition(" [")
    if not group.endswith("]") or collective(op) not in _COLLECTIVES.values():
        return None
    return collective(op), group[:-1]


def host_kind(name: str, category: str) -> Kind:
    """What a thread of the host does in an event."""
    if carries_out(name) or name.startswith(_DISPATCHED):
        return "communication"
    if category != "cpu_op":
        return "other"
    if name.startswith(_PYTHON):
        return "other"
    return "copy" if name in _COPIES else "compute"


def device_kind(name: str, category: str, args: dict[str, object]) -> Kind:
    """What a stream of the device does in an event."""
    if category in ("gpu_memcpy", "gpu_memset"):
        return "copy"
    if "Collective name" in args or name.lower().startswith(("nccl", "hccl", "rccl")):
        return "communication"
    return "compute"
