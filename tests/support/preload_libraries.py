"""Imported by every fork server: what the ranks, or the files of their tests, import otherwise.

Only what is installed: a library's tests run with that library alone.
"""

import importlib
import importlib.util

NAMES = (
    "ms_memory.session",
    "ms_ops.attention.portable",
    "ms_ops.attention.reference",
    "ms_ops.comm",
    "ms_ops.testing",
    "ms_parallel.context.attention",
    "ms_parallel.context.build",
    "ms_profile.memory.meter",
    "numpy",
    "pytest",
)

for name in NAMES:
    if importlib.util.find_spec(name.partition(".")[0]) is not None:
        importlib.import_module(name)
