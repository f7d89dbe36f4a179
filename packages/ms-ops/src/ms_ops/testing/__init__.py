"""The test body that every backend shares, shipped so that backends elsewhere can use it."""

from .body import (
    DTYPES,
    check_backend,
    check_compiled,
    check_custom_op,
    check_deterministic,
    check_errors,
    check_fake,
    check_gradients,
    check_values,
    declines,
    find_sample,
    is_small,
    poisoned_empty,
)
from .case import ErrorSample, OpTest, Sample, maker
from .cases import OPERATORS
from .tolerance import assert_close, max_error, roundings

__all__ = [
    "DTYPES",
    "OPERATORS",
    "ErrorSample",
    "OpTest",
    "Sample",
    "assert_close",
    "check_backend",
    "check_compiled",
    "check_custom_op",
    "check_deterministic",
    "check_errors",
    "check_fake",
    "check_gradients",
    "check_values",
    "declines",
    "find_sample",
    "is_small",
    "maker",
    "max_error",
    "poisoned_empty",
    "roundings",
]
