"""Pictures, tables and summaries of what was measured.

    from ms_profile import report

    report.memory_curve(meter, "memory.svg")
    report.print_communication(meter)
    report.print_summary(report.summarise("profile_dir"))

Pictures need matplotlib and tables need rich: `pip install 'ms-profile[report]'`. Reading a profile
needs neither, nor torch. Files are read as untrusted input, see `TraceError` and `Limits`.
"""

from __future__ import annotations

import importlib
from typing import Any

# Public name -> module that defines it; imported on first use.
_PUBLIC = {
    "Comparison": "changes",
    "Limits": "stream",
    "RankSummary": "summary",
    "Run": "run",
    "RunSummary": "summary",
    "TraceError": "stream",
    "communication_matrix": "pictures",
    "compare": "changes",
    "memory_curve": "pictures",
    "print_communication": "tables",
    "print_comparison": "overview",
    "print_flops": "tables",
    "print_memory": "tables",
    "print_summary": "overview",
    "read_run": "run",
    "save": "meters",
    "summarise": "run",
    "timeline": "pictures",
}

__all__ = list(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"{__name__}.{_PUBLIC[name]}")
    return getattr(module, name)


def __dir__() -> list[str]:
    return sorted(__all__)
