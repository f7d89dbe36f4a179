"""torch_npu's profiler as the wheel has it: the recorded names, and our settings accepted."""

import importlib.util

import pytest

from support import npu_profiler

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("torch_npu") is None, reason="needs the torch_npu wheel"
)


@pytest.fixture(scope="module", autouse=True)
def _torch_npu(tmp_path_factory):
    from support import npu_stubs

    npu_stubs.import_torch_npu(tmp_path_factory.mktemp("stubs"))


def test_the_record_is_what_the_wheel_has():
    import torch_npu.profiler

    recorded = npu_profiler.recorded()
    assert torch_npu.__version__.split("+")[0] == recorded.pop("version")
    assert npu_profiler.read(torch_npu.profiler) == recorded


@pytest.mark.parametrize("level", [0, 1, 2])
def test_it_takes_our_settings_as_they_are(level, capfd):
    from ms_profile.profiler.collection import Collection
    from ms_profile.profiler.npu import settings

    config = settings(Collection(level=level))["experimental_config"]
    assert config._profiler_level == f"Level{level}"
    assert ("NONE" in config._aic_metrics) == (level == 0)
    assert "reset" not in "".join(capfd.readouterr())  # what it says when it changes a setting


def test_options_of_hccl_hold_a_groups_name():
    pytest.importorskip("mindspeed")
    from mindspeed.features.profile.trace import wrap_group_options

    options = wrap_group_options(lambda name, configs: None)("tp-cp", {})
    assert options.hccl_config == {"group_name": "tp-cp"}
