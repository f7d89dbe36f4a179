"""These tests need the torch_npu wheel (hatch run npu:test); elsewhere they are not collected."""

import pytest

from support import npu_stubs

collect_ignore_glob = [] if npu_stubs.installed() else ["test_*.py"]


@pytest.fixture(scope="session", autouse=True)
def _lines_are_noted(tmp_path_factory):
    from support import npu_contract

    npu_contract.lines_folder = tmp_path_factory.mktemp("lines")
    yield
    npu_contract.lines_folder = None
