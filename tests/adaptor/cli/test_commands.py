"""The `mindspeed` command: every subcommand, its exit status, and its behaviour on bad input."""

import json
import subprocess
import sys

import pytest

from mindspeed.cli import main
from mindspeed.patching.plan import Plan

BARE = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("megatron", "torch", "torch_npu", "triton"):
            raise ImportError("blocked: " + name)
sys.meta_path.insert(0, Blocked())
from mindspeed.cli import main
status = main({argv!r})
assert not {{n.split(".")[0] for n in sys.modules}} & {{"megatron", "torch"}}
sys.exit(status)
"""


@pytest.mark.parametrize(
    ("argv", "word"),
    [
        (["doctor"], "megatron-core"),
        (["plan", "--level", "0", "--", "--num-layers", "4"], "patches act"),
        (["features"], "level0.norm"),
        (["conflicts"], "pairs of built features"),
        (["flags", "--status", "kept"], "--optimization-level"),
        (["--help"], "doctor"),
    ],
)
def test_commands_work_without_torch_and_without_megatron_being_importable(argv, word):
    code = BARE.format(argv=argv)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stderr
    assert word in done.stdout
    assert "Traceback" not in done.stderr


def run(capsys, *argv):
    try:
        status = main(list(argv))
    except SystemExit as stop:
        status = stop.code
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_plan_as_json_can_be_read_back(capsys):
    status, out, _ = run(capsys, "plan", "--json", "--level", "0", "--device", "cpu", "--")
    assert status == 0
    plan = Plan.from_json(out)
    assert plan.level == 0
    assert len(plan.acting) > 10


def test_plan_shows_target_kind_feature_because_and_status(capsys):
    status, out, _ = run(capsys, "plan", "--level", "0", "--device", "cpu", "--megatron", "0.16.1")
    assert status == 0
    for word in ("target", "kind", "because", "status", "_gather_along_first_dim", "wrap",
                 "level0.collectives", "level 0, device == 'cpu'", "apply"):  # fmt: skip
        assert word in out
    assert "assumed, none is installed" in out


def test_plan_takes_the_level_from_megatrons_arguments(capsys):
    _, out, _ = run(capsys, "plan", "--json", "--", "--optimization-level", "0")
    assert json.loads(out)["level"] == 0


@pytest.mark.parametrize(
    ("argv", "status", "words"),
    [
        (["plan", "--", "--no-such-flag"], 2, "unknown flag --no-such-flag"),
        (["plan", "--", "--num-layer", "4"], 2, "did you mean '--num-layers'"),
        (["plan", "--", "--use-nanopipe-swap"], 2, "planned but not built yet"),
        (["plan", "--", "--jit-compile"], 2, "is not supported"),
        (["plan", "--", "stray"], 2, "belong to no flag: stray"),
        (["plan", "--num-layers", "4"], 2, "unrecognized arguments"),
        (["plan", "--megatron", "/nowhere"], 2, "no megatron/ package there"),
        (["plan", "--level", "0", "--megatron", "0.12.1"], 1, "outside the supported range"),
        (["plan", "--level", "0", "--", "--use-fused-swiglu"], 1, "give --optimization-level 1"),
        (["plan", "--level", "1", "--", "--use-fused-swiglu"], 1, "the model has no SwiGLU"),
        (["plan", "--level", "5"], 2, "invalid choice"),
        (["flags", "--status", "some"], 2, "invalid choice"),
        (["fingerprint"], 2, "--from"),
        (["fingerprint", "--from", "/nowhere"], 2, "no megatron/ package there"),
        (["plans"], 2, "invalid choice: 'plans'"),
        ([], 2, "Megatron-LM on CPU"),
    ],
)
def test_bad_input_is_answered_in_words(capsys, argv, status, words):
    found, out, err = run(capsys, *argv)
    assert found == status
    assert words in out + err
    assert "Traceback" not in out + err


def test_train_and_run_get_their_whole_command_line(capsys, monkeypatch):
    seen = []
    for name in ("train", "run"):
        module = type(sys)("delegate")
        module.main = lambda argv, name=name: seen.append((name, argv))
        monkeypatch.setitem(sys.modules, f"delegate_{name}", module)
        monkeypatch.setitem(main.__globals__["DELEGATED"], name, (f"delegate_{name}", "text"))
        assert run(capsys, name, "--help", "--", "x")[0] == 0
    assert seen == [("train", ["--help", "--", "x"]), ("run", ["--help", "--", "x"])]


def test_a_missing_part_says_what_to_install(capsys, monkeypatch):
    monkeypatch.setitem(main.__globals__["DELEGATED"], "train", ("no_such_part", "text"))
    status, _, err = run(capsys, "train")
    assert status == 1
    assert "no_such_part is not installed; pip install 'mindspeed[train]'" in err


def test_features_lists_built_and_planned_ones(capsys):
    _, out, _ = run(capsys, "features", "--json")
    rows = {row["feature"]: row for row in json.loads(out)}
    assert rows["level0.norm"]["status"] == "built"
    assert rows["level0.norm"]["patches"] == 1
    assert rows["pipeline.recompute"]["status"] == "planned"
    assert rows["pipeline.recompute"]["flags"] == [
        "--recompute-in-bubble",
        "--recompute-in-advance",
    ]


def test_flags_as_json_hold_every_row(capsys):
    _, out, _ = run(capsys, "flags", "--json")
    assert len(json.loads(out)) == 168


def test_a_renamed_flag_is_noted_on_one_line(capsys):
    status, _, err = run(capsys, "plan", "--level", "0", "--", "--multi-head-latent-attention")
    assert status == 0
    assert err == (
        "mindspeed plan: --multi-head-latent-attention is Megatron's --multi-latent-attention;"
        " taken as that\n"
    )
