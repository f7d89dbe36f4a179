"""What each communication operator moves: which operation it is, how many bytes, to whom.

A reader turns the arguments of one dispatched operator into transfers. The bytes that a rank sends
follow the textbook algorithm that moves least, written as direct sends: every rank owns one chunk
of the buffer; a reduce-scatter sends each owner its chunk, an all-gather sends the own chunk to
all, an all-reduce is one after the other. Rooted operations send straight to or from the root.
Chunks of a buffer that does not divide are those of `torch.tensor_split`: the first ranks get one
element more. So every number is an integer, and the sum over the ranks is the textbook's sum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

__all__ = ["READERS", "Reader", "Transfer", "register"]


@dataclass(frozen=True)
class Transfer:
    """One operation of one rank.

    Attributes:
        op: all_reduce, all_gather, reduce_scatter, broadcast, reduce, gather, scatter, all_to_all,
            send, recv or barrier.
        bytes: Size of the operation's full buffer.
        sent: Bytes to each other rank, by rank within the group; ranks that get none may lack.
        dtype: Name of the element type, "mixed" for several, empty for none.
    """

    op: str
    bytes: int
    sent: Mapping[int, int] = field(default_factory=dict)
    dtype: str = ""


#: Arguments by name, own rank in the group and size of the group -> transfers in order.
Reader = Callable[[Mapping[str, Any], int, int], Iterable[Transfer]]


def all_reduce(tensors: str) -> Reader:
    """Reads an operator that reduces the argument `tensors` in place or to a copy."""

    def read(args: Mapping[str, Any], me: int, size: int) -> Iterable[Transfer]:
        sent = dict.fromkeys((rank for rank in range(size) if rank != me), 0)
        for tensor in flat(args[tensors]):
            chunks = even_chunks(tensor, size)
            for rank in sent:
                sent[rank] += chunks[rank] + chunks[me]
        yield Transfer("all_reduce", nbytes(args[tensors]), sent, dtype(args[tensors]))

    return read


def all_gather(own: str, gathered: str | None = None) -> Reader:
    """Reads an operator that gathers `own`; equal parts are assumed where no output is an argument.

    A list of outputs per input repeats the inputs' sizes, so its bytes are the gathered bytes.
    """

    def read(args: Mapping[str, Any], me: int, size: int) -> Iterable[Transfer]:
        part = nbytes(args[own])
        total = part * size if gathered is None else nbytes(args[gathered])
        yield Transfer("all_gather", total, to_others(part, me, size), dtype(args[own]))

    return read


def reduce_scatter(full: str) -> Reader:
    """Reads an operator that reduces `full` and leaves each rank its chunk."""

    def read(args: Mapping[str, Any], me: int, size: int) -> Iterable[Transfer]:
        sent = to_owners(equal_or_listed(args[full], size), me)
        yield Transfer("reduce_scatter", nbytes(args[full]), sent, dtype(args[full]))

    return read


def broadcast(tensors: str, root: str) -> Reader:
    """Reads an operator that copies `tensors` from the group's rank `root`."""

    def read(args: Mapping[str, Any], me: int, size: int) -> Iterable[Transfer]:
        total = nbytes(args[tensors])
        sent = to_others(total, me, size) if me == args[root] else {}
        yield Transfer("broadcast", total, sent, dtype(args[tensors]))

    return read


def reduce(args: Mapping[str, Any], me: int, size: int) -> Iterable[Transfer]:
    """Reads `reduce_`."""
    total, root = nbytes(args["tensors"]), args["root_rank"]
    yield Transfer("reduce", total, {root: total} if me != root else {}, dtype(args["tensors"]))


def gather(args: Mapping[str, Any], me: int, size: int) -> Iterable[Transfer]:
    """Reads `gather_`; only the root has outputs, the parts are equal."""
    part, root = nbytes(args["input_tensors"]), args["root_rank"]
    sent = {root: part} if me != root else {}
    yield Transfer("gather", part * size, sent, dtype(args["input_tensors"]))


def scatter(args: Mapping[str, Any], me: int, size: int) -> Iterable[Transfer]:
    """Reads `scatter_`; only the root has inputs, the parts are equal."""
    part = nbytes(args["output_tensors"])
    sent = to_others(part, me, size) if me == args["root_rank"] else {}
    yield Transfer("scatter", part * size, sent, dtype(args["output_tensors"]))


def all_to_all(args: Mapping[str, Any], me: int, size: int) -> Iterable[Transfer]:
    """Reads `alltoall_`: one input tensor per rank."""
    inputs = args["input_tensors"]
    sent = to_owners([nbytes(each) for each in inputs], me)
    yield Transfer("all_to_all", nbytes(inputs), sent, dtype(inputs))


def all_to_all_rows(args: Mapping[str, Any], me: int, size: int) -> Iterable[Transfer]:
    """Reads the single-tensor forms: rows of the input per rank, equal when none are given."""
    tensor, splits = args["input"], args["input_split_sizes"]
    total = nbytes(tensor)
    if splits:
        row = total // len(tensor) if len(tensor) else 0
        chunks = [rows * row for rows in splits]
    else:
        chunks = [total // size] * size
    yield Transfer("all_to_all", total, to_owners(chunks, me), dtype(tensor))


def shard_dim_all_to_all(args: Mapping[str, Any], me: int, size: int) -> Iterable[Transfer]:
    """Reads DTensor's change of the sharded dimension, which sends even chunks."""
    tensor = args["input"]
    sent = to_others(nbytes(tensor) // size, me, size)
    yield Transfer("all_to_all", nbytes(tensor), sent, dtype(tensor))


def send(tensors: str) -> Reader:
    """Reads an operator that sends `tensors` to the group's rank `dst`."""

    def read(args: Mapping[str, Any], me: int, size: int) -> Iterable[Transfer]:
        total = nbytes(args[tensors])
        yield Transfer("send", total, {args["dst"]: total}, dtype(args[tensors]))

    return read


def receive(tensors: str) -> Reader:
    """Reads an operator that receives `tensors` and sends nothing."""

    def read(args: Mapping[str, Any], me: int, size: int) -> Iterable[Transfer]:
        yield Transfer("recv", nbytes(args[tensors]), {}, dtype(args[tensors]))

    return read


def batch_of_sends_and_receives(args: Mapping[str, Any], me: int, size: int) -> Iterable[Transfer]:
    """Reads the functional batch: names, peers and tensors side by side."""
    for name, peer, tensor in zip(args["op_list"], args["peer_list"], args["tensors"], strict=True):
        if name == "isend":
            yield Transfer("send", nbytes(tensor), {peer: nbytes(tensor)}, dtype(tensor))
        else:
            yield Transfer("recv", nbytes(tensor), {}, dtype(tensor))


def barrier(args: Mapping[str, Any], me: int, size: int) -> Iterable[Transfer]:
    """Reads a barrier, which moves no data of the program."""
    yield Transfer("barrier", 0)


def flat(tensors: Any) -> list[Tensor]:
    """Tensors of an argument that is one, a list of them or a list of lists."""
    if isinstance(tensors, Tensor):
        return [tensors]
    return [tensor for each in tensors for tensor in flat(each)]


def nbytes(tensors: Any) -> int:
    """Bytes of all tensors of an argument; of a sparse one its indices and values."""
    return sum(
        nbytes([tensor._indices(), tensor._values()])
        if tensor.is_sparse
        else tensor.numel() * tensor.element_size()
        for tensor in flat(tensors)
    )


def dtype(tensors: Any) -> str:
    """Name of the element type that all tensors have, else "mixed"."""
    names = {str(tensor.dtype).removeprefix("torch.") for tensor in flat(tensors)}
    return names.pop() if len(names) == 1 else "mixed" if names else ""


def even_chunks(tensor: Tensor, size: int) -> list[int]:
    """Bytes of the chunk that each rank owns of a buffer that is reduced and gathered."""
    width = tensor.element_size()
    each, more = divmod(nbytes(tensor) // width, size)
    return [(each + (rank < more)) * width for rank in range(size)]


def equal_or_listed(tensors: Any, size: int) -> list[int]:
    """Bytes per owner: listed for every input as one tensor per rank, or equal parts of each."""
    chunks = [0] * size
    for each in [tensors] if isinstance(tensors, Tensor) else tensors:
        parts = [nbytes(each) // size] * size if isinstance(each, Tensor) else map(nbytes, each)
        chunks = [chunk + part for chunk, part in zip(chunks, parts, strict=True)]
    return chunks


def to_others(count: int, me: int, size: int) -> dict[int, int]:
    """The same number of bytes to every other rank."""
    return {rank: count for rank in range(size) if rank != me}


def to_owners(chunks: Sequence[int], me: int) -> dict[int, int]:
    """Every rank's chunk to that rank, the own one kept."""
    return {rank: chunk for rank, chunk in enumerate(chunks) if rank != me}


_FUNCTIONAL: Mapping[str, Reader] = {
    "all_gather_into_tensor": all_gather("input"),
    "all_gather_into_tensor_coalesced": all_gather("inputs"),
    "all_gather_into_tensor_out": all_gather("input"),
    "all_reduce": all_reduce("input"),
    "all_reduce_": all_reduce("input"),
    "all_reduce_coalesced": all_reduce("inputs"),
    "all_reduce_coalesced_": all_reduce("inputs"),
    "all_to_all_single": all_to_all_rows,
    "batch_p2p_ops": batch_of_sends_and_receives,
    "broadcast": broadcast("input", "src"),
    "broadcast_": broadcast("input", "src"),
    "irecv": receive("tensor"),
    "isend": send("tensor"),
    "reduce_scatter_tensor": reduce_scatter("input"),
    "reduce_scatter_tensor_coalesced": reduce_scatter("inputs"),
    "reduce_scatter_tensor_out": reduce_scatter("input"),
}

#: Reader of every known operator, by its qualified name.
READERS: dict[str, Reader] = {
    "c10d::_allgather_base_": all_gather("input_tensor", "output_tensor"),
    "c10d::_reduce_scatter_base_": reduce_scatter("input_tensor"),
    "c10d::allgather_": all_gather("input_tensors", "output_tensors"),
    "c10d::allgather_coalesced_": all_gather("input_list", "output_lists"),
    "c10d::allgather_into_tensor_coalesced_": all_gather("inputs", "outputs"),
    "c10d::allreduce_": all_reduce("tensors"),
    "c10d::allreduce_coalesced_": all_reduce("tensors"),
    "c10d::alltoall_": all_to_all,
    "c10d::alltoall_base_": all_to_all_rows,
    "c10d::barrier": barrier,
    "c10d::broadcast_": broadcast("tensors", "root_rank"),
    "c10d::gather_": gather,
    "c10d::monitored_barrier_": barrier,
    "c10d::recv_": receive("tensors"),
    "c10d::recv_any_source_": receive("tensors"),
    "c10d::reduce_": reduce,
    "c10d::reduce_scatter_": reduce_scatter("input_tensors"),
    "c10d::reduce_scatter_tensor_coalesced_": reduce_scatter("inputs"),
    "c10d::scatter_": scatter,
    "c10d::send": send("tensors"),
    "_dtensor::shard_dim_alltoall": shard_dim_all_to_all,
    **{f"_c10d_functional::{name}": reader for name, reader in _FUNCTIONAL.items()},
    # Outside of autograd these arrive whole; inside, their inner operator arrives instead.
    **{f"_c10d_functional_autograd::{name}": reader for name, reader in _FUNCTIONAL.items()},
}


def register(name: str, reader: Reader) -> None:
    """Teaches the meters one more operator that communicates, such as a fused product.

    Args:
        name: Qualified name of the operator, `namespace::name`.
        reader: Called with the arguments by name (defaults left out), the own rank in the group
            and the group's size; returns the transfers.

    Raises:
        ValueError: the operator has a reader already.
    """
    if name in READERS:
        raise ValueError(f"{name} has a reader already")
    READERS[name] = reader
