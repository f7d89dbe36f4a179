"""Numbers for people."""

from __future__ import annotations


def _scaled(value: float, step: float, names: tuple[str, ...]) -> str:
    index = 0
    while abs(value) >= step and index < len(names) - 1:
        value, index = value / step, index + 1
    whole = index == 0 and value == int(value)
    shown = f"{value:.0f}" if whole or abs(value) >= 100 else f"{value:.3g}"
    return f"{shown} {names[index]}".rstrip()


def size(count: float) -> str:
    """Bytes with a binary unit: `1.5 MiB`."""
    return _scaled(count, 1024, ("B", "KiB", "MiB", "GiB", "TiB", "PiB"))


def flops(count: float) -> str:
    """Floating-point operations with a decimal unit: `14.5 GFLOP`."""
    return _scaled(count, 1000, ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP", "EFLOP"))


def duration(seconds: float) -> str:
    """Time: `1.2 ms`."""
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        if abs(seconds) * factor >= 1 or unit == "us":
            value = seconds * factor
            return f"{value:.0f} {unit}" if abs(value) >= 100 else f"{value:.3g} {unit}"
    raise AssertionError("unreachable")


def share(part: float, whole: float) -> str:
    """Part of a whole in percent, or nothing if there is no whole."""
    return f"{100 * part / whole:.1f} %" if whole else ""


def change(before: float, after: float) -> str:
    """Relative change in percent, with a sign; empty if there was nothing before."""
    return f"{100 * (after - before) / before:+.1f} %" if before else ""


def binary_scale(largest: float) -> tuple[float, str]:
    """Divisor and unit in which `largest` bytes read well on an axis."""
    names = ("B", "KiB", "MiB", "GiB", "TiB")
    index = 0
    while largest >= 1024 ** (index + 1) and index < len(names) - 1:
        index += 1
    return float(1024**index), names[index]


def time_scale(longest: float) -> tuple[float, str]:
    """Factor and unit in which `longest` seconds read well on an axis."""
    if longest >= 2:
        return 1.0, "s"
    return (1e3, "ms") if longest >= 2e-3 else (1e6, "us")
