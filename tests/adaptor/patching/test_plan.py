"""Plans: pure, complete in what they report, and the same for the same input."""

import dataclasses
import json
import subprocess
import sys
from argparse import Namespace
from importlib.util import find_spec

import pytest

from mindspeed.patching import Flag, Rule
from mindspeed.patching.errors import PlanError
from mindspeed.patching.plan import Plan, draft, plan
from mindspeed.patching.records import Choice, Feature
from mindspeed.patching.table import TableError, make_table

PURE = """
import sys
class Blocked:
    def find_spec(self, name, path, target=None):
        if name.split(".")[0] in ("megatron", "torch", "torch_npu", "triton", "numpy"):
            raise ImportError("blocked: " + name)
if {block}:
    sys.meta_path.insert(0, Blocked())
sys.argv = ["x", "--optimization-level", "7", "--context-parallel-size", "nonsense"]
import mindspeed
made = mindspeed.plan({{"sequence_parallel": True}}, level=0, device="cpu", megatron={megatron!r})
print(made.to_json())
loaded = {{name.split(".")[0] for name in sys.modules}} & {{"megatron", "torch", "rich", "numpy"}}
assert not loaded, loaded
"""


def run_pure(block, megatron="0.16.1"):
    code = PURE.format(block=block, megatron=megatron)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_plan_needs_no_megatron_no_torch_and_no_argv():
    assert run_pure(True) == run_pure(False)


def test_the_installed_megatron_is_read_and_not_imported():
    assert json.loads(run_pure(True, "auto")) == json.loads(run_pure(False, "auto"))


def test_a_plan_survives_json_and_notices_changes():
    made = plan(level=0, device="cpu")
    assert Plan.from_json(made.to_json()) == made
    data = json.loads(made.to_json())
    data["steps"][0]["patch"]["value"] = "elsewhere:thing"
    with pytest.raises(ValueError, match="was changed"):
        Plan.from_json(json.dumps(data))
    for text in ("{}", "[]", "no json", '{"digest": 1}'):
        with pytest.raises(ValueError, match="not a plan"):
            Plan.from_json(text)


def test_a_plan_is_immutable_and_hashed_by_content(lab):
    first = lab.plan(lab.feature(lab.patch("m:f")))
    assert first.digest == lab.plan(lab.feature(lab.patch("m:f"))).digest
    assert first.digest != lab.plan(lab.feature(lab.patch("m:g"))).digest
    with pytest.raises(dataclasses.FrozenInstanceError):
        first.level = 1


def test_level_zero_has_few_patches_each_with_a_reason():
    made = plan(level=0, device="cpu", megatron="0.16.1")
    steps = made.steps
    attributes = [step for step in steps if step.patch.kind != "stub_module"]
    assert 0 < len(attributes) <= 25
    assert all(len(step.patch.reason.split()) >= 5 for step in steps)
    assert all(step.signature or step.patch.kind == "add" for step in made.acting)


def test_cuda_needs_fewer_patches_than_the_cpu():
    acting = {d: {s.patch.target for s in plan(level=0, device=d).acting} for d in ("cpu", "cuda")}
    assert acting["cuda"] < acting["cpu"]


@pytest.mark.parametrize("make", [dict, lambda v: Namespace(**v), lambda v: type("C", (), v)()])
def test_a_configuration_may_be_anything_with_values(lab, make):
    feature = lab.feature(lab.patch("m:f", when="num_layers > 3"))
    for layers, acts in ((4, 1), (2, 0)):
        made = lab.plan(feature, config=make({"num_layers": layers}))
        assert len(made.acting) == acts


def test_a_condition_without_a_value_is_a_problem_and_not_a_guess(lab):
    feature = lab.feature(lab.patch("m:f", when="num_layers > 3"), name="one")
    other = lab.feature(name="two", when="num_layers > 3")
    with pytest.raises(PlanError, match="with num_layers=None") as caught:
        lab.plan(feature, other, config={"num_layers": None})
    assert len(caught.value.problems) == 2


def test_a_command_line_is_no_configuration(lab):
    with pytest.raises(TypeError, match="parse the command line first"):
        lab.plan(lab.feature(), config=["--num-layers", "4"])


def test_a_choice_of_no_flag_of_megatrons_is_refused():
    wrong = Feature("a.b", 1, doc="d", choices=(Choice("--no-such-flag", "x"),))
    with pytest.raises(TableError, match="--no-such-flag is no flag of Megatron's"):
        make_table([wrong])


def feature_with(lab, name="cp.ring", level=2, **fields):
    return lab.feature(name=name, level=level, flags=(Flag("--a-ring", help="h"),), **fields)


def test_a_flag_above_the_level_names_the_level_to_ask_for(lab):
    feature = feature_with(lab)
    for level in (0, 1):
        with pytest.raises(PlanError, match=r"--a-ring \(cp.ring\).*--optimization-level 2"):
            lab.plan(feature, config={"a_ring": True}, level=level)
    assert lab.plan(feature, config={"a_ring": True}).features == ("cp.ring",)
    assert lab.plan(feature, level=0).features == ()


def test_a_missing_package_says_what_to_install(lab, monkeypatch):
    monkeypatch.setattr("mindspeed.levels.is_installed", lambda name: name != "ms-parallel")
    feature = feature_with(lab, packages=("ms-ops", "ms-parallel"))
    with pytest.raises(PlanError, match=r"cp.ring needs ms-parallel.*'mindspeed\[l2\]'"):
        lab.plan(feature, config={"a_ring": True})
    assert lab.plan(feature).features == ()


RULES = [
    ("requires", "a_ring", "context_parallel_size > 1", {"context_parallel_size": 1}),
    ("implies", "a_ring", "context_parallel_size > 1", {"context_parallel_size": 1}),
    ("forbids", "a_ring", "sequence_parallel", {"sequence_parallel": True}),
    ("divides", "context_parallel_size", "seq_length", {"context_parallel_size": 3}),
    ("divides", "context_parallel_size", "seq_length", {"context_parallel_size": 0}),
    ("divides", "context_parallel_size", "seq_length", {"seq_length": None}),
    ("range", "context_parallel_size", "1 <= context_parallel_size <= 8", {}),
]
FINE = {"a_ring": True, "context_parallel_size": 4, "sequence_parallel": False, "seq_length": 64}


@pytest.mark.parametrize(("kind", "left", "right", "change"), RULES)
def test_rules(lab, kind, left, right, change):
    feature = feature_with(lab, rules=(Rule(kind, left, right, "the text", "do this"),))
    assert lab.plan(feature, config=FINE)
    change = change or {"context_parallel_size": 9}
    with pytest.raises(PlanError, match=r"cp.ring: the text \(.*\)"):
        lab.plan(feature, config={**FINE, **change})
    assert lab.plan(feature, config={**FINE, **change, "a_ring": False})


def legal(values):
    return f"legal: {values['seq_length'] // 2}."


def test_a_rule_can_say_what_would_be_legal(lab):
    hint = f"{__name__}:legal"
    feature = feature_with(lab, rules=(Rule("forbids", "a_ring", "True", "no", "Mind.", hint),))
    with pytest.raises(PlanError, match=r"no \(a_ring=True\)\. Mind\. legal: 32\."):
        lab.plan(feature, config=FINE)
    with pytest.raises(ValueError, match="hint must look like"):
        Rule("forbids", "a_ring", "True", "no", hint="no reference")


def test_every_problem_is_reported_at_once(lab):
    one = feature_with(lab, name="one", rules=(Rule("forbids", "a_ring", "True", "first"),))
    flag = Flag("--b", help="h")
    two = lab.feature(
        name="two",
        flags=(flag,),
        rules=(Rule("forbids", "b", "True", "second"), Rule("forbids", "b", "a_ring", "third")),
    )
    three = lab.feature(name="three", level=2, flags=(Flag("--c", help="h"),))
    config = {"a_ring": True, "b": True, "c": True}
    with pytest.raises(PlanError) as caught:
        lab.plan(one, two, three, config=config, level=1)
    assert len(caught.value.problems) == 4
    made = lab.plan(one, two, three, config=config, level=1, draft_only=True)
    assert made.problems == caught.value.problems


def test_planned_and_dropped_flags_in_a_configuration_are_problems():
    config = {"use_nanopipe_swap": True, "jit_compile": True, "num_layers": 4}
    with pytest.raises(PlanError) as caught:
        plan(config, level=0)
    text = str(caught.value)
    assert "--use-nanopipe-swap is planned but not built yet" in text
    assert "--jit-compile is not supported: call torch_npu" in text
    assert len(caught.value.problems) == 2


@pytest.mark.parametrize(
    ("value", "given"), [(0, False), (False, False), (1, True), (True, True), ([0, 0], True)]
)
def test_a_flag_is_given_when_its_value_is_not_the_default(lab, value, given):
    assert lab.plan(feature_with(lab), config={"a_ring": value}).features == ("cp.ring",) * given


def test_an_array_in_the_configuration_is_a_value_like_any_other(lab):
    numpy = pytest.importorskip("numpy")
    made = lab.plan(feature_with(lab), config={"a_ring": numpy.array([0, 0])})
    assert made.features == ("cp.ring",)


def test_a_validated_namespace_of_megatron_is_no_problem():
    """Names that Megatron sets for itself are never taken for flags of ours."""
    from mindspeed.features.native import native_defaults

    given = {name: object() for name in native_defaults() if name != "optimization_level"}
    problems = draft(given, level=0).problems
    assert not [text for text in problems if "planned" in text or "not supported" in text]


@pytest.mark.parametrize(
    ("argument", "value", "words"),
    [
        ("level", 3, "0, 1 or 2"),
        ("level", True, "0, 1 or 2"),
        ("device", "tpu", "'auto', 'cpu', 'npu' or 'cuda'"),
        ("megatron", "/nowhere", "no megatron/ package there"),
    ],
)
def test_malformed_arguments(argument, value, words):
    with pytest.raises(ValueError, match=words):
        plan(**{argument: value})


@pytest.mark.skipif(find_spec("ms_ops") is None, reason="ms-ops is not installed")
def test_the_level_comes_from_the_configuration():
    assert plan({"optimization_level": 1}, level=None).level == 1


def test_the_level_comes_from_what_is_installed(monkeypatch):
    monkeypatch.setattr("mindspeed.levels.is_installed", lambda name: False)
    assert plan(None, level=None, device="cpu").level == 0


def test_device_choice(monkeypatch):
    monkeypatch.setenv("MS_DEVICE", "npu")
    assert plan(level=0).device in ("npu", "cpu")  # an installed device layer goes first
    monkeypatch.setenv("MS_DEVICE", "abacus")
    from mindspeed.patching import detect

    monkeypatch.delitem(sys.modules, "mindspeed.device", raising=False)
    with pytest.raises(ValueError, match="MS_DEVICE is 'abacus'"):
        detect.device_type()
