"""Peak rates of devices: dense matrix products, from the vendors' data sheets, in FLOP/s.

Sparsity is never assumed. A part whose name says nothing of its variant gets the value of the
larger one, so that a utilisation is never flattered. Values that a vendor states only for another
part are left out: give them by hand.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

TERA = 10**12

_BF16, _FP16, _FP32, _FP64 = "bfloat16", "float16", "float32", "float64"


def _rates(half: float, single: float, **more: float) -> Mapping[str, float]:
    return {_BF16: half, _FP16: half, _FP32: single, **more}


# Part of a product name (upper case) to TFLOP/s by type, the longest match wins. "tf32" is what
# fp32 products reach when they may round their inputs. Sources: NVIDIA data sheets and architecture
# white papers of the product (dense figures; half of those stated with sparsity), AMD Instinct data
# sheets, Huawei's launch figure of Ascend 910; no public figure of the 910B could be confirmed.
PEAKS: dict[str, Mapping[str, float]] = {
    "V100": {_FP16: 125.0, _FP32: 15.7, _FP64: 7.8},
    "T4": {_FP16: 65.0, _FP32: 8.1},
    "A10": _rates(125.0, 31.2, tf32=62.5),
    "A30": _rates(165.0, 10.3, tf32=82.0, float64=10.3),
    "A40": _rates(149.7, 37.4, tf32=74.8),
    "A100": _rates(312.0, 19.5, tf32=156.0, float64=19.5),
    "A800": _rates(312.0, 19.5, tf32=156.0, float64=19.5),
    "L4": _rates(121.0, 30.3, tf32=60.0, float8=242.5),
    "L40": _rates(181.0, 90.5, tf32=90.5, float8=362.0),
    "L40S": _rates(362.0, 91.6, tf32=183.0, float8=733.0),
    "H100": _rates(989.4, 66.9, tf32=494.7, float64=66.9, float8=1978.9),
    "H100 PCIE": _rates(756.0, 51.2, tf32=378.0, float64=51.2, float8=1513.0),
    "H100 NVL": _rates(835.0, 60.0, tf32=417.0, float64=60.0, float8=1670.0),
    "H200": _rates(989.4, 66.9, tf32=494.7, float64=66.9, float8=1978.9),
    "H800": _rates(989.4, 66.9, tf32=494.7, float8=1978.9),
    "GH200": _rates(989.4, 66.9, tf32=494.7, float64=66.9, float8=1978.9),
    "H20": _rates(148.0, 44.0, tf32=74.0, float8=296.0),
    "B200": _rates(2250.0, 75.0, tf32=1125.0, float8=4500.0),
    "MI250X": _rates(383.0, 95.7, float64=95.7),
    "MI300X": _rates(1307.4, 163.4, tf32=653.7, float64=163.4, float8=2614.9),
    "ASCEND910": {_FP16: 256.0},
}


def peak_flops(
    device: str | torch.device | None = None, dtype: torch.dtype | str = torch.bfloat16
) -> float | None:
    """Return the peak rate of a device for matrix products of a type, FLOP/s.

    Args:
        device: a product name ("NVIDIA H100 80GB HBM3", "Ascend910B3"), a torch device, whose name
            is asked of its runtime, or None for the current accelerator.
        dtype: of the operands; "tf32" for fp32 products that may round them.

    Returns:
        FLOP/s, or None when it is not in the table; a CPU always is not: give the number by hand.

    Example:
        >>> peak_flops("NVIDIA H100 80GB HBM3", torch.bfloat16)
        989400000000000.0
    """
    name = device if isinstance(device, str) and not _is_type(device) else device_name(device)
    rates = PEAKS.get(_best(name.upper()), {})
    kind = str(dtype).removeprefix("torch.")
    rate = rates.get("float8" if kind.startswith("float8") else kind)
    return None if rate is None else rate * TERA


def device_name(device: str | torch.device | None = None) -> str:
    """Return the product name of a device; "cpu" for a CPU."""
    if device is None:
        found = torch.accelerator.current_accelerator() if hasattr(torch, "accelerator") else None
        device = found or torch.device("cpu")
    device = torch.device(device)
    if device.type in ("cpu", "meta"):
        return device.type
    runtime: Any = getattr(torch, device.type)
    return str(runtime.get_device_name(device))


def _is_type(text: str) -> bool:
    try:
        torch.device(text)
    except RuntimeError:
        return False
    return True


def _best(name: str) -> str:
    """The longest entry that stands in a name as whole words."""
    words = name.replace("-", " ").split()
    found = ""
    for key in PEAKS:
        parts = key.split()
        starts = range(len(words) - len(parts) + 1)
        if len(key) > len(found) and any(words[i : i + len(parts)] == parts for i in starts):
            found = key
    if "PCIE" in words and f"{found} PCIE" in PEAKS:
        return f"{found} PCIE"
    return found
