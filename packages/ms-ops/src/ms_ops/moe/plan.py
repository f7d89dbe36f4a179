"""Where the rows of a routing map come from."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import fail


class Rows(NamedTuple):
    """What a routing map says of the permuted rows.

    `place` [rows] is a row's place t * E + e in the flattened map, `by_token` [rows] lists the
    rows in the order of their tokens.
    """

    place: Tensor
    by_token: Tensor


def rows_of(routing_map: Tensor, rows: int, drop_and_pad: bool) -> Rows:
    """Sort the map's entries by expert."""
    experts = max(routing_map.shape[1], 1)
    if drop_and_pad:
        place = _padded(routing_map, rows)
        return Rows(place, (place // experts).argsort(stable=True))
    places = _places(routing_map, rows)
    # The smaller the integers, the faster they are sorted.
    key = places % experts
    order = (key.to(torch.int16) if experts < 2**15 else key).argsort(stable=True)
    return Rows(places[order], inverse(order))


def rows_by(
    sorted_indices: Tensor, routing_map: Tensor, drop_and_pad: bool
) -> tuple[Tensor, Tensor]:
    """Return the places of the rows in the order of their tokens, and that order in int64.

    Cheaper than `rows_of`, because the order is known.
    """
    by_token = sorted_indices.long()
    if drop_and_pad:
        return _padded(routing_map, by_token.shape[0])[by_token], by_token
    return _places(routing_map, by_token.shape[0]), by_token


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


def _places(routing_map: Tensor, rows: int) -> Tensor:
    """Return the places of the True entries, in order."""
    flat = routing_map.reshape(-1)
    if is_plain(flat):
        places = flat.nonzero().squeeze(1)
        _compare(places.shape[0], rows)
        return places
    # The number of rows is given, so nothing is read from the device.
    return (~flat).to(torch.int8).argsort(stable=True)[:rows]


def _padded(routing_map: Tensor, rows: int) -> Tensor:
    """Return the places of the rows when every expert has the same number of them."""
    experts = routing_map.shape[1]
    order = (~routing_map).to(torch.int8).argsort(dim=0, stable=True)[: rows // experts]
    return (order * experts + torch.arange(experts, device=order.device)).t().reshape(-1)
