"""What swapping cannot be combined with, which layers its flags mean, and what it says it frees."""

from types import SimpleNamespace

import pytest

import mindspeed
from mindspeed.features.memory import settings
from mindspeed.features.memory.swap import hints
from mindspeed.features.memory.swap.layers import first_layers, swapped_layers
from mindspeed.train.args import parse
from mindspeed.train.validate import ConfigError, check

SWAP = {"swap_attention": True}
FULL = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}
INPUTS = {"swap_layer_input": True, **FULL}
FOUR_OF_TWO = {"num_layers": 8, "pipeline_model_parallel_size": 2}

REFUSED = [
    ({**SWAP, **FULL}, "E-M13: --swap-attention with --recompute-granularity full"),
    ({**SWAP, "attention_dropout": 0.1}, "E-M13: --swap-attention with --attention-dropout"),
    (
        {**SWAP, "recompute_method": "block"},
        "E-M13: --swap-attention with --recompute-method block: .*Give --recompute-num-layers",
    ),
    *(
        (
            {**SWAP, "recompute_granularity": "selective", "recompute_modules": [name]},
            "E-M13: --swap-attention with --recompute-modules layernorm, mla_up_proj or moe_act",
        )
        for name in ("layernorm", "mla_up_proj", "moe_act")
    ),
    ({"swap_layer_input": True}, "E-M14: --swap-layer-input without full recomputation"),
    (
        {"swap_layer_input": True, "recompute_granularity": "selective"},
        "E-M14: --swap-layer-input without full recomputation",
    ),
    ({**INPUTS, **SWAP}, "E-M14: --swap-layer-input with --swap-attention"),
    ({**SWAP, "cpu_offloading": True}, "E-M18: .* with --cpu-offloading-num-layers"),
    (
        {**INPUTS, "fine_grained_activation_offloading": True},
        "E-M18: .* with --fine-grained-activation-offloading",
    ),
    (
        {**SWAP, **FOUR_OF_TWO, "recompute_num_layers": 5},
        "number of layers of one pipeline rank .*--recompute-num-layers: 1 to 4",
    ),
    ({"swap_modules": "self_attention"}, "--swap-modules names what --swap-attention swaps"),
    ({"swap_depth": 2}, "nothing is swapped"),
    ({"swap_min_bytes": 0}, "nothing is swapped"),
    ({"swap_host_bytes": 1 << 30}, "nothing is swapped"),
    ({**SWAP, "swap_depth": -1}, "must be 0 or more"),
    ({**INPUTS, "swap_host_bytes": 0}, "--swap-host-bytes more than 0"),
]


@pytest.mark.parametrize(("values", "words"), REFUSED)
def test_refused_with_its_code(values, words):
    defaults = {"attention_dropout": 0.0}
    with pytest.raises(mindspeed.PlanError, match=words):
        mindspeed.plan({**defaults, **values}, level=2)


@pytest.mark.parametrize(
    ("values", "feature"),
    [
        (SWAP, "memory.swap_activations"),
        ({**SWAP, **FOUR_OF_TWO, "recompute_num_layers": 4}, "memory.swap_activations"),
        ({**SWAP, "recompute_num_layers": 1, "recompute_method": "block"}, "memory.session"),
        ({**SWAP, "recompute_granularity": "selective"}, "memory.session"),
        (
            {**SWAP, "recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
            "memory.session",
        ),
        ({**SWAP, "recompute_norm": True, "swap_depth": 0}, "memory.recompute"),
        (INPUTS, "memory.swap_layer_input"),
        ({**INPUTS, "distribute_saved_activations": True}, "memory.session"),
        ({**SWAP, "gradient_accumulation_fusion": True}, "memory.weights"),
    ],
)
def test_served_at_level_2_alone(values, feature):
    values = {"attention_dropout": 0.0, **values}
    assert feature in mindspeed.plan(values, level=2).features
    with pytest.raises(mindspeed.PlanError, match="belongs to optimization level 2"):
        mindspeed.plan(values, level=1)


def test_attention_with_dropout_is_fused_on_a_divided_sequence():
    values = {**SWAP, "attention_dropout": 0.1, "context_parallel_size": 2}
    assert "memory.swap_activations" in mindspeed.plan(values, level=2).features


PARTS = {
    "input_norm,self_attention,post_attention_norm": (
        "input_layernorm",
        "self_attention",
        "pre_mlp_layernorm",
    ),
    " mlp, self_attention": ("self_attention", "mlp"),
}


@pytest.mark.parametrize(("names", "modules"), PARTS.items())
def test_parts_of_a_layer(names, modules):
    assert settings.parts(names) == modules
    found = settings.settings({**SWAP, "swap_modules": names, "recompute_num_layers": 3})
    assert (found.swap_parts, found.swap_layers, found.mlp_layers) == (modules, None, 3)


def test_a_wrong_part_is_refused_before_any_process_starts():
    words = ["--swap-attention", "--swap-modules", "self_atention", "--optimization-level", "2"]
    wanted = "got 'self_atention', need some of input_norm, self_attention, .*mean 'self_attention'"
    with pytest.raises(ConfigError, match=wanted):
        check(parse(words).config, 1)
    with pytest.raises(ValueError, match="--swap-modules: got ' , '"):
        settings.parts(" , ")


def test_recompute_method_belongs_to_full_recomputation_or_swapped_attention():
    words = ["--recompute-method", "block", "--recompute-num-layers", "1"]
    with pytest.raises(ConfigError, match="or --swap-attention"):
        check(parse(words).config, 1)
    check(parse([*words, "--swap-attention", "--optimization-level", "2"]).config, 1)


# Of a rank's n first layers: those of each of its chunks.
TURNS = [
    (0, 2, 2, [[], []]),
    (1, 2, 2, [[0], []]),
    (2, 2, 2, [[0], [0]]),
    (3, 2, 2, [[0, 1], [0]]),
    (4, 2, 2, [[0, 1], [0, 1]]),
    (2, 4, 1, [[0, 1]]),
]


@pytest.mark.parametrize(("number", "layers", "chunks", "wanted"), TURNS)
def test_numbers_of_layers_go_round_the_chunks(number, layers, chunks, wanted):
    place = [{"chunks": chunks, "chunk": c} for c in range(chunks)]
    assert [first_layers(number, layers, **p) for p in place] == wanted
    assert [swapped_layers(number, layers, last=True, **p) for p in place] == wanted


def test_all_layers_but_the_models_last():
    assert swapped_layers(None, 3) == [0, 1, 2]
    assert swapped_layers(None, 3, last=True) == [0, 1]
    assert swapped_layers(None, 1, last=True) == [0]


def test_advice_is_in_bytes():
    sizes = {"seq_length": 8192, "micro_batch_size": 1, "num_attention_heads": 32, "bf16": True}
    config = SimpleNamespace(**sizes, hidden_size=4096, tensor_model_parallel_size=1)
    mib = 2 * 8192 * 4096 // 2**20
    assert hints.attention_bytes(config) == 9 * mib * 2**20 + 4 * 8192 * 32
    assert hints.advise(config).startswith(f"frees about {9 * mib + 1:.1f} MiB a layer")
    config.tensor_model_parallel_size, config.sequence_parallel = 4, True
    assert hints.attention_bytes(config) == (9 * mib + 1) * 2**18
    assert hints.advise_inputs(config).startswith(f"frees {mib / 4:.1f} MiB")
    ungrouped = SimpleNamespace(**vars(config), num_query_groups=1, group_query_attention=False)
    grouped = SimpleNamespace(**vars(config), num_query_groups=8, group_query_attention=True)
    assert hints.attention_bytes(ungrouped) == hints.attention_bytes(config)
    assert hints.attention_bytes(grouped) == (9 * mib + 1 - 9 * mib // 4) * 2**18
    for advise in (hints.advise, hints.advise_inputs):
        assert advise(SimpleNamespace(seq_length=None)).startswith("bytes need --seq-length")
