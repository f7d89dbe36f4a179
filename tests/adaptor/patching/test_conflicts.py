"""Pairs of flags that end in MindSpeed's engine are reported here before anything is applied."""

import pytest

from mindspeed.patching import Flag, Rule
from mindspeed.patching.conflicts import Claim, conflicts
from mindspeed.patching.errors import PlanError
from mindspeed.patching.matrix import pair_matrix
from mindspeed.patching.table import TableError, make_table

DDP = "megatron.core.distributed.distributed_data_parallel:DistributedDataParallel.__init__"
ROW = "megatron.core.tensor_parallel.layers:RowParallelLinear.forward"
COLUMN = "megatron.core.tensor_parallel.layers:ColumnParallelLinear.forward"
LINEAR = "megatron.core.tensor_parallel.layers:linear_with_grad_accumulation_and_async_allreduce"
SAVE = "megatron.training.checkpointing:save_checkpoint"
STEP = "megatron.training.training:train_step"
P2P = "megatron.core.pipeline_parallel.p2p_communication:_p2p_ops"
MLP = "megatron.core.transformer.mlp:MLP.__init__"
GROUPED = "megatron.core.transformer.moe.experts:GroupedMLP.forward"
CONFIG = "megatron.core.transformer.transformer_config:TransformerConfig.__post_init__"
INTERLEAVED = (
    "megatron.core.pipeline_parallel.schedules:forward_backward_pipelining_with_interleaving"
)

# Which two flags, and the names that both claim.
PAIRS = [
    ("--a-zero3", "--a-pipe-experts", (ROW, COLUMN, LINEAR)),
    ("--a-zero3", "--a-nanopipe", (ROW, COLUMN, LINEAR)),
    ("--a-zero3", "--a-ampipe", (ROW, COLUMN, LINEAR)),
    ("--a-ema", "--a-layerzero", (SAVE,)),
    ("--a-ema", "--a-dualpipev", (STEP,)),
    ("--a-reset-mask", "--a-vpp-send-recv", (P2P,)),
    ("--a-fb-overlap", "--a-alltoall-overlap", (MLP, GROUPED)),
    ("--a-fb-overlap", "--a-allgather-overlap", (MLP, GROUPED)),
    ("--a-tp-2d", "--a-unaligned-linear", (CONFIG,)),
    ("--a-tp-2d", "--a-fb-overlap-with-vpp", (INTERLEAVED,)),
]


def claiming(lab, flag, targets, **fields):
    name = flag.strip("-").replace("-", "_")
    return lab.feature(
        *(lab.patch(target) for target in targets),
        name=f"feature.{name}",
        level=2,
        flags=(Flag(flag, help="a flag"),),
        **fields,
    )


@pytest.mark.parametrize(("first", "second", "targets"), PAIRS)
def test_every_pair_is_reported_with_every_name(lab, first, second, targets):
    features = [claiming(lab, flag, targets) for flag in (first, second)]
    config = {flag.attribute: True for feature in features for flag in feature.flags}
    with pytest.raises(PlanError) as caught:
        lab.plan(*features, config=config)
    assert len(caught.value.problems) == len(targets)
    for target, text in zip(targets, caught.value.problems, strict=True):
        for word in (first, second, features[0].name, features[1].name, target):
            assert word in text


@pytest.mark.parametrize("given", PAIRS[0][:2])
def test_one_of_the_two_alone_is_fine(lab, given):
    features = [claiming(lab, flag, PAIRS[0][2]) for flag in PAIRS[0][:2]]
    dest = next(f.flags[0].attribute for f in features if f.flags[0].name == given)
    assert len(lab.plan(*features, config={dest: True}).acting) == 3


def test_a_feature_that_cannot_start_at_its_own_level_is_found(lab):
    always = lab.feature(lab.patch(DDP), name="context.gradient_scale", level=2)
    zero3 = claiming(lab, "--a-zero3", (DDP,))
    assert lab.plan(always, zero3).acting
    with pytest.raises(PlanError, match=r"always on from level 2.*--a-zero3"):
        lab.plan(always, zero3, config={"a_zero3": True})


def test_a_rule_and_a_collision_are_reported_together(lab):
    forbid = Rule(
        "forbids", "a_tp_2d", "a_unaligned_linear", "the grid needs even heads", "drop it"
    )
    first = claiming(lab, "--a-tp-2d", (CONFIG,), rules=(forbid,))
    second = claiming(lab, "--a-unaligned-linear", (CONFIG,))
    with pytest.raises(PlanError) as caught:
        lab.plan(first, second, config={"a_tp_2d": True, "a_unaligned_linear": True})
    rule, collision = caught.value.problems
    assert "needs even heads (a_tp_2d=True, a_unaligned_linear=True). drop it" in rule
    assert CONFIG in collision


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        (("m:C", "replace"), ("m:C.f", "wrap"), "object that is gone"),
        (("m:C.f", "set"), ("m:C", "replace"), "object that is gone"),
        (("m.leaf", "stub_module"), ("m.leaf:f", "wrap"), "stubs the module"),
        (("m.leaf.deep:f", "wrap"), ("m.leaf", "stub_module"), "stubs the module"),
        (("m:f", "add"), ("m:f", "replace"), "add and replace"),
        (("m:f", "wrap"), ("m:f", "wrap"), "which one is inside"),
    ],
)
def test_the_kinds_of_conflict(lab, first, second, words):
    claims = [
        Claim(lab.feature(name=name), lab.patch(*patch))
        for name, patch in (("one", first), ("two", second))
    ]
    (text,) = conflicts(claims)
    assert words in text


def test_neighbours_do_not_conflict(lab):
    patches = [("m:C.f", "replace"), ("m:C.g", "replace"), ("m:CC", "replace"), ("m2:C", "set")]
    claims = [Claim(lab.feature(name="one"), lab.patch(*patch)) for patch in patches]
    assert list(conflicts(claims)) == []


def test_the_matrix_lists_pairs_without_any_configuration(lab):
    first, second = (claiming(lab, flag, PAIRS[3][2]) for flag in PAIRS[3][:2])
    rule = Rule("forbids", "a_third", "a_ema", "one copy of the weights is enough")
    third = claiming(lab, "--a-third", (DDP,), rules=(rule,))
    cpu_only = lab.feature(lab.patch(DDP, when="device == 'cpu'"), name="cpu")
    npu_only = lab.feature(lab.patch(DDP, when="device == 'npu'"), name="npu")
    matrix = pair_matrix(make_table([first, second, third, cpu_only, npu_only]))
    pairs = {(pair.first, pair.second): pair.because for pair in matrix}
    assert set(pairs) == {
        ("feature.a_ema", "feature.a_layerzero"),
        ("feature.a_ema", "feature.a_third"),
        ("feature.a_third", "cpu"),
        ("feature.a_third", "npu"),
    }
    assert SAVE in pairs[("feature.a_ema", "feature.a_layerzero")][0]
    assert "one copy of the weights" in pairs[("feature.a_ema", "feature.a_third")][0]


def test_the_table_itself_is_checked(lab):
    flag = Flag("--same", help="h")
    with pytest.raises(TableError, match="one and two both declare --same"):
        make_table([lab.feature(name="one", flags=(flag,)), lab.feature(name="two", flags=(flag,))])
    with pytest.raises(TableError, match="two features are named 'one'"):
        make_table([lab.feature(name="one"), lab.feature(name="one")])
    with pytest.raises(TableError, match="'virtual_optimizer' is not declared"):
        make_table([lab.feature(rules=(Rule("forbids", "virtual_optimizer", "level", "t"),))])
    with pytest.raises(TableError, match="'no_such' is not declared"):
        make_table([lab.feature(lab.patch("m:f", when="no_such"))])
