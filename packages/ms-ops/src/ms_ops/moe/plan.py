"""Where the rows of a routing map come from and where they go back to."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import fail


class Rows(NamedTuple):
    """Token and expert of each permuted row, [rows] each."""

    token: Tensor
    expert: Tensor


def rows_of(routing_map: Tensor, rows: int, drop_and_pad: bool) -> Rows:
    """Read the map expert by expert."""
    tokens, experts = routing_map.shape
    if drop_and_pad:
        order = (~routing_map).to(torch.int8).argsort(dim=0, stable=True)[: rows // experts]
        expert = torch.arange(experts, device=order.device).expand_as(order)
        return Rows(order.t().reshape(-1), expert.t().reshape(-1))
    if is_plain(routing_map):
        found = routing_map.t().nonzero()
        _compare(found.shape[0], rows)
        return Rows(found[:, 1], found[:, 0])
    # The number of rows is given, so nothing is read from the device.
    places = (~routing_map.t().reshape(-1)).to(torch.int8).argsort(stable=True)[:rows]
    return Rows(places % max(tokens, 1), places // max(tokens, 1))


def order_by_token(token: Tensor, tokens: int) -> Tensor:
    """Return the rows sorted by token."""
    # The smaller the integers, the faster they are sorted.
    return (token.to(torch.int16) if tokens < 2**15 else token).argsort(stable=True)


def tokens_in_order(sorted_indices: Tensor, routing_map: Tensor, drop_and_pad: bool) -> Tensor:
    """Return the token of each row, the rows sorted by token."""
    count = sorted_indices.shape[0]
    if drop_and_pad:
        return rows_of(routing_map, count, True).token[sorted_indices.long()]
    # Summing into int32 takes a sixth of the time of int64.
    sizes = routing_map.sum(1, dtype=torch.int32)
    tokens = torch.arange(routing_map.shape[0], device=routing_map.device)
    return tokens.repeat_interleave(sizes, output_size=count)


def starts_of(sorted_indices: Tensor, routing_map: Tensor, drop_and_pad: bool) -> Tensor:
    """Return where the rows of each token start in `sorted_indices`, in its dtype."""
    if drop_and_pad:
        ordered = tokens_in_order(sorted_indices, routing_map, True)
        tokens = torch.arange(routing_map.shape[0], device=ordered.device)
        return torch.searchsorted(ordered, tokens).to(sorted_indices.dtype)
    sizes = routing_map.sum(1, dtype=sorted_indices.dtype)
    return sizes.cumsum(0, dtype=sorted_indices.dtype) - sizes


def places_in_order(sorted_indices: Tensor, routing_map: Tensor, drop_and_pad: bool) -> Tensor:
    """Return the place t * E + e of each row in the flattened map, the rows sorted by token."""
    count = sorted_indices.shape[0]
    if drop_and_pad:
        token, expert = rows_of(routing_map, count, True)
        return (token * routing_map.shape[1] + expert)[sorted_indices.long()]
    flat = routing_map.reshape(-1)
    if is_plain(flat):
        return flat.nonzero().squeeze(1)
    return (~flat).to(torch.int8).argsort(stable=True)[:count]


def inverse(order: Tensor) -> Tensor:
    """Return the inverse of a permutation."""
    numbers = torch.arange(order.shape[0], device=order.device)
    return torch.empty_like(order).scatter_(0, order, numbers)


def is_plain(tensor: Tensor) -> bool:
    """Say whether a tensor's values may steer what is launched: on the host, outside of a trace."""
    return type(tensor) is Tensor and tensor.device.type == "cpu"


def check_map_rows(routing_map: Tensor, rows: int) -> None:
    """Raise unless a map that lies on the host has as many True entries as rows are asked for."""
    if is_plain(routing_map):
        _compare(int(routing_map.count_nonzero()), rows)


def _compare(entries: int, rows: int) -> None:
    if entries != rows:
        need = f"{entries}, the True entries of routing_map"
        fail(ValueError, "moe_permute_map", "num_out_tokens", rows, need)
