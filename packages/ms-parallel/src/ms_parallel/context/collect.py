"""Collectives of the executor: the head exchange of a node, and keys and values of all nodes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .heads import Interval
from .pack import pack_heads, pack_rows, unpack_heads, unpack_rows, widths
from .store import Piece
from .transport import Steps, Transport

if TYPE_CHECKING:
    from .executor import Run
    from .job import Job


def to_heads(
    job: Job,
    transport: Transport,
    parts: Sequence[Tensor],
    ranges: Sequence[Sequence[Interval]],
) -> Steps[tuple[Tensor, ...]]:
    """Return the node's tensors [Sn, B, h, D] from this process's [s, B, H, D]."""
    places = job.places()
    flat = pack_heads(parts, ranges)
    rows = []
    for part, part_ranges in zip(parts, ranges, strict=True):
        first, last = part_ranges[job.place]
        rows.append((part.shape[1], last - first, part.shape[3]))
    if job.plan.ulysses > 1:
        per_token = widths(ranges, [p.shape[1] * p.shape[3] for p in parts])
        sent = [parts[0].shape[0] * n for n in per_token]
        received = [n * per_token[job.place] for n in places.counts]
        out = flat.new_empty(sum(received))
        yield transport.all_to_all("places", out, flat, received, sent)
        flat = out
    return tuple(unpack_heads(flat, places, rows))


def to_tokens(
    job: Job,
    transport: Transport,
    parts: Sequence[Tensor],
    ranges: Sequence[Sequence[Interval]],
) -> Steps[tuple[Tensor, ...]]:
    """Return this process's tensors [s, B, H, D] from the node's; copies of heads are summed."""
    places = job.places()
    flat = pack_rows(parts, places)
    count = job.plan.layout.length(job.rank)
    rows = []
    for part, part_ranges in zip(parts, ranges, strict=True):
        heads = max(b for _, b in part_ranges)
        rows.append((part.shape[1], heads, part.shape[3]))
    if job.plan.ulysses > 1:
        mixed = flat.dtype != parts[0].dtype
        sizes = [p.shape[1] * p.shape[3] * (p.element_size() if mixed else 1) for p in parts]
        per_token = widths(ranges, sizes)
        sent = [n * per_token[job.place] for n in places.counts]
        received = [count * n for n in per_token]
        out = flat.new_empty(sum(received))
        yield transport.all_to_all("places", out, flat, received, sent)
        flat = out
    return tuple(unpack_rows(flat, count, rows, ranges, [p.dtype for p in parts]))


def gather_keys(run: Run, parts: Sequence[str]) -> Steps[Tensor]:
    """Bring keys, values or both of all nodes here; return them, node after node.

    Each node's are its keys, then its values.
    """
    job = run.job
    own = [run.store.over(part, job.node, 0, job.rows)[0].rows for part in parts]
    flat = torch.cat([rows.reshape(-1) for rows in own])
    width = sum(run.job.shapes.elements(part, "kv") for part in parts)
    lengths = [n * width for n in job.plan.nodes.lengths]
    out = flat.new_empty(sum(lengths))
    if len(set(lengths)) == 1:
        yield run.transport.all_gather(out, flat)
    else:
        # Only here may the parts have different sizes.
        sent = [flat.numel()] * len(lengths)
        yield run.transport.all_to_all("nodes", out, flat.repeat(len(lengths)), lengths, sent)
    hold_gathered(run, out, parts)
    return out


def hold_gathered(run: Run, flat: Tensor, parts: Sequence[str]) -> None:
    """Take gathered rows of every node of which there are none yet."""
    at = 0
    for owner, count in enumerate(run.job.plan.nodes.lengths):
        for part in parts:
            size = count * run.job.shapes.elements(part, "kv")
            rows = flat[at : at + size].view(count, *run.job.shapes.row(part))
            if not run.store.pieces(part, owner):
                run.store.put(part, owner, Piece(0, count, rows))
            at += size


def scatter_sums(run: Run, flat: Tensor) -> Steps[Tensor]:
    """Sum the nodes' gradients of all keys and values; return this node's, keys then values."""
    job, size = run.job, run.job.plan.nodes.size
    width = flat.numel() // max(1, job.plan.nodes.total)
    lengths = [n * width for n in job.plan.nodes.lengths]
    if len(set(lengths)) == 1:
        out = flat.new_empty(lengths[0])
        yield run.transport.reduce_scatter(out, flat)
        return out
    received = [lengths[job.node]] * size
    parts = flat.new_empty(sum(received))
    yield run.transport.all_to_all("nodes", parts, flat, received, lengths)
    return parts.view(size, -1).to(job.shapes.sums).sum(0)


__all__ = ["gather_keys", "hold_gathered", "scatter_sums", "to_heads", "to_tokens"]
