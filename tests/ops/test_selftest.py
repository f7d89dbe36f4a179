"""python -m ms_ops.selftest: what it prints, what it says when something is wrong or missing."""

import json

import pytest

import ms_ops
from ms_ops import selftest
from ms_ops.activation import reference

MAPS = "moe_permute_map: weights, choices, capacity"


def printed(capsys):
    return json.loads(capsys.readouterr().out)


def test_report_of_a_backend(capsys):
    assert selftest.main(["--backend", "portable", "--device", "cpu", "--op", "swiglu"]) == 0
    report = printed(capsys)
    swiglu = report["operators"]["swiglu"]
    assert report["failures"] == 0
    assert report["ms_ops"] == ms_ops.__version__
    assert swiglu["served"] > 20
    assert 0 < swiglu["roundings"]["bfloat16"] < 2
    assert set(swiglu["timing"]["forward_seconds"]) == {"portable", "reference"}


def test_npu_on_the_emulation_with_answers(capsys):
    assert selftest.main(["--backend", "npu", "--emulated", "--op", "rms_norm"]) == 0
    report = printed(capsys)
    assert report["emulated"]
    declined = report["operators"]["rms_norm"]["declined"]
    assert list(declined) == ["torch_npu has no kernel for torch.float64"]
    rows = report["answers"]["attention: rows without keys"]["inner_precise=2"]
    assert rows == {"maximum": "-inf", "sum": 0.0, "output_is_zero": True}
    assert report["answers"]["rope: backward without x"] == {"same_without_x": True}
    answers = report["answers"]
    assert answers["grouped_matmul_add_: accumulation"]["largest_error"] < 1e-4
    assert answers["matmul_add_: torch's product into fp32"]["relative_error"] < 1e-6
    assert answers["attention_merge: lengths of a pack"]["TND, ends"] is True
    assert answers["moe_permute: dtypes and choices"]["choices"] == {"65536": True, "1048576": True}
    assert "need 2 experts" in answers[MAPS]["unequal choices are right"]
    failed = [name for name, found in answers.items() if "Error" in str(found)[:30]]
    assert failed == []


def test_a_wrong_kernel_is_reported(capsys):
    def wrong(x, dim):
        return 2 * reference.forward(x, dim)

    kernels = {"swiglu": ms_ops.Kernel(wrong, reference.backward)}
    ms_ops.register_backend("swiglu", ms_ops.Backend("wrong", 500, kernels))
    try:
        arguments = ["--backend", "wrong", "--device", "cpu", "--op", "swiglu"]
        assert selftest.main(arguments) == 1
    finally:
        ms_ops.unregister_backend("swiglu", "wrong")
    report = printed(capsys)
    assert report["failures"] > 10
    assert "outside class E1" in report["operators"]["swiglu"]["failures"][0]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--backend", "npu"], "torch_npu is not installed"),
        (["--backend", "nosuch"], "no operator has it"),
        (["--backend", "portable", "--emulated"], "only npu has an emulation"),
    ],
)
def test_a_backend_that_cannot_run_here(arguments, reason, capsys):
    assert selftest.main(arguments) == 2
    assert reason in capsys.readouterr().err
