"""torch_npu's operators in plain torch, so that NPU backends run for real without an NPU.

The operators are defined with the schemas recorded in `schemas.json` from a real torch_npu, so
that a wrong keyword or a missing argument fails as it would there, and computed on CPU tensors as
the vendor documents them: layouts, mask polarity, statistics, dtypes, what is refused. Where the
documents allow two readings, `Readings` picks one, and tests run both.

    with emulated_npu():
        ms_ops.testing.check_backend("rms_norm", "npu")
"""

from .library import emulated_npu, recorded_schemas
from .readings import Readings

__all__ = ["Readings", "emulated_npu", "recorded_schemas"]
