"""`import mindspeed` does nothing and offers the whole public API."""

import subprocess
import sys

import pytest

import mindspeed
from mindspeed import levels

PURE = """
import sys
before = set(sys.modules)
import mindspeed
assert mindspeed.__version__
loaded = {name for name in sys.modules if name.startswith("mindspeed")}
assert loaded == {"mindspeed"}, loaded
assert not {"torch", "megatron", "numpy"} & set(sys.modules)
"""


def test_importing_the_package_imports_nothing():
    done = subprocess.run([sys.executable, "-c", PURE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_public_name_is_there():
    assert set(mindspeed.__all__) <= set(dir(mindspeed))
    for name in mindspeed.__all__:
        assert getattr(mindspeed, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'apply_all'"):
        _ = mindspeed.apply_all


def test_levels_and_the_packages_they_need():
    assert levels.needed_for(0) == ()
    assert levels.needed_for(1) == ("ms-ops",)
    assert set(levels.needed_for(1)) <= set(levels.needed_for(2)) <= set(levels.EXTRAS["l2"])
    assert levels.extra_for("ms-ops") == "mindspeed[l1]"
    assert levels.extra_for("ms-moe") == "mindspeed[l2]"
    assert levels.extra_for("ms-profile") == "mindspeed[profile]"
    assert levels.extra_for("unheard-of") == "unheard-of"
    for level in (-1, 3, "1", None):
        with pytest.raises(ValueError, match="0, 1 or 2"):
            levels.needed_for(level)
