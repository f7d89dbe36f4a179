"""These tests need triton (hatch run triton:test); elsewhere they are not collected.

Triton decides at its import whether kernels are interpreted or compiled: one run for each.
"""

import importlib.util

from ms_ops import triton

collect_ignore_glob = ["test_*.py"]
if importlib.util.find_spec("triton"):
    collect_ignore_glob = [
        "test_compiled.py" if triton.interpreted() else "test_interpreted*.py",
    ]
