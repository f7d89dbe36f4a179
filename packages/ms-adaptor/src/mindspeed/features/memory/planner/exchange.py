"""Plain data between ranks, as JSON."""

from __future__ import annotations

import json
from typing import Any

import torch
import torch.distributed as dist


def exchange(data: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Return what every rank of a group brought, in order of rank.

    Args:
        data: lists, dictionaries, strings, numbers.
        group: None: all ranks.
    """
    device = _device(group)
    payload = torch.frombuffer(bytearray(json.dumps(data).encode()), dtype=torch.uint8)
    size = torch.tensor([payload.numel()], dtype=torch.int32, device=device)
    sizes = [torch.empty_like(size) for _ in range(dist.get_world_size(group))]
    dist.all_gather(sizes, size, group=group)
    lengths = [int(one) for one in torch.cat(sizes).tolist()]
    mine = torch.zeros(max(lengths), dtype=torch.uint8, device=device)
    mine[: payload.numel()] = payload.to(device)
    rows = [torch.empty_like(mine) for _ in lengths]
    dist.all_gather(rows, mine, group=group)
    found = zip(rows, lengths, strict=True)
    return [json.loads(bytes(row[:length].cpu().tolist())) for row, length in found]


def _device(group: dist.ProcessGroup | None) -> torch.device:
    if dist.get_backend(group) == "gloo":
        return torch.device("cpu")
    found = torch.accelerator.current_accelerator()
    assert found is not None
    return torch.device(found.type, torch.accelerator.current_device_index())
