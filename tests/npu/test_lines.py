"""Which lines of the NPU backends ran on fake tensors of the real torch_npu: all but these."""

import json

import pytest

from support import npu_contract
from support.npu_backends import never_run

ELSEWHERE = {}


def test_every_line_ran_on_the_wheel():
    """Runs after the contract tests; with a part of them it has nothing to say."""
    noted = len(list(npu_contract.lines_folder.glob("*.json")))
    if noted < 50:
        pytest.skip(f"{noted} of the contract tests ran, this needs all of them")
    missing = never_run(npu_contract.lines_folder)
    assert missing == ELSEWHERE, json.dumps(missing, indent=1)
