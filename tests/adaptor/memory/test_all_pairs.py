"""Each pair of memory features leaves the numbers as they are, or is refused by its code.

Whoever adds a feature adds a row to `FEATURES` for it, and its pairs to `REFUSED` if they are.
"""

import itertools

import pytest

import mindspeed
from mindspeed.features import load_features
from mindspeed.features.flags import flag_rows
from support.memory_runs import config
from support.ranks import run_ranks

FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
BLOCK = {**FULL, "recompute_method": "block"}
DISCARD = {"recompute_granularity": "selective", "recompute_modules": ("layernorm",)}
CORE = {"recompute_granularity": "selective", "recompute_modules": ("core_attn",)}
# Name -> what is given for it, and what it needs: the run that it is compared with has the latter.
FEATURES = {
    "discard": (DISCARD, {}),
    "core": (CORE, {}),
    "full": (FULL, {}),
    "block": (BLOCK, {}),
    "divided": ({"distribute_saved_activations": True}, FULL),
    "activation": ({"recompute_activation_function": True}, {}),
    "norm": ({"recompute_norm": True}, {}),
    "attention": ({"swap_attention": True, "swap_min_bytes": 0}, {}),
    "inputs": ({"swap_layer_input": True, "swap_min_bytes": 0}, FULL),
    "packed": ({"reuse_fp32_param": True}, {"bf16": True}),
    "optimizer": ({"swap_optimizer": True}, {"bf16": True}),
    "planner": ({"memory_budget": "97%"}, {}),
}
SELECTIVE = ("discard", "core")
WHOLE = ("full", "block")
MANUAL = (*SELECTIVE, *WHOLE, "divided", "activation", "norm", "attention", "inputs")
# Code -> the pairs that it refuses.
REFUSED = {
    "one flag, two values": {
        *itertools.combinations(("discard", "core", "full", "block"), 2),
        *itertools.product(("discard", "core", "block"), ("divided", "inputs")),
    },
    "E-M11": set(itertools.product(MANUAL, ("planner",))),
    "E-M12": set(
        itertools.product((*SELECTIVE, "full", "divided", "inputs"), ("activation", "norm"))
    ),
    "E-M13": {
        *itertools.product(("discard", *WHOLE, "divided", "inputs"), ("attention",)),
    },
    "E-M15": {("optimizer", "packed")},
}
# No features by themselves: what others share, rules, a line that is logged, a repair of "full".
SHARED = {f"memory.{name}" for name in ("session", "weights", "conflicts", "pools", "uniform")}
PAIRS = list(itertools.combinations(FEATURES, 2))


def together(first, second):
    """What both ask for and need; None where they give one flag two values."""
    given = [{**needs, **flags} for flags, needs in (FEATURES[first], FEATURES[second])]
    shared = given[0].keys() & given[1].keys()
    return {**given[0], **given[1]} if all(given[0][k] == given[1][k] for k in shared) else None


def base(first, second):
    """What the pair is compared with."""
    needs = {**FEATURES[first][1], **FEATURES[second][1]}
    # Rounding is the packed optimizer's own, see its tests.
    return {**needs, **(FEATURES["packed"][0] if "packed" in (first, second) else {})}


def every_pair(rank, world_size, pairs):
    from support.memory_runs import train

    def run(options):
        return train({"num_layers": 2, "global_batch_size": 1, **options})["parameters"]

    plain, found = {}, {}
    for pair in pairs:
        key = str(sorted(base(*pair).items()))
        if key not in plain:
            plain[key] = run(base(*pair))
        found[pair] = run(together(*pair)) == plain[key]
    return found


def built():
    """The rows whose flags are there: a flag that is planned is refused by itself."""
    planned = {row.flag.dest for row in flag_rows() if row.flag.status == "planned"}
    return {name for name, (flags, _) in FEATURES.items() if not flags.keys() & planned}


def expected(pair):
    """The code that refuses a pair, None where it trains."""
    codes = [code for code, pairs in REFUSED.items() if {pair, pair[::-1]} & pairs]
    assert len(codes) <= 1
    return codes[0] if codes else None


@pytest.fixture(scope="module")
def found():
    here = built()
    pairs = [p for p in PAIRS if expected(p) is None and here.issuperset(p)]
    env = {"MS_MEMORY_SIM": "late"}
    (got,) = run_ranks(every_pair, 1, pairs, preload="megatron", env=env, timeout=180)
    return got


@pytest.mark.parametrize("pair", PAIRS, ids=" and ".join)
def test_all_pairs(found, pair):
    code = expected(pair)
    both = together(*pair)
    assert (both is None) == (code == "one flag, two values")
    if both is None or not built().issuperset(pair):
        assert pair not in found
    elif code is None:
        assert found[pair]
    else:
        # Before any process starts.
        with pytest.raises(mindspeed.PlanError, match=code):
            mindspeed.plan(config(both).plan_values(), level=2)


def test_every_feature_has_a_row():
    given = {name for flags, _ in FEATURES.values() for name in flags}
    lacking = [
        feature.name
        for feature in load_features()
        if feature.name.startswith("memory.")
        and feature.name not in SHARED
        and not given & {flag.dest for flag in feature.flags}
    ]
    assert lacking == []
    assert {name for pairs in REFUSED.values() for pair in pairs for name in pair} <= set(FEATURES)
