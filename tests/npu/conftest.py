"""These tests need the torch_npu wheel (hatch run npu:test); elsewhere they are not collected."""

from support import npu_stubs

collect_ignore_glob = [] if npu_stubs.installed() else ["test_*.py"]
