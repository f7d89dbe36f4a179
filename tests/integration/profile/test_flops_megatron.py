"""Megatron's models: exact FLOPs against closed forms, over layouts and recomputation."""

from contextlib import ExitStack
from dataclasses import dataclass

import pytest
import torch

from mindspeed.train import TrainConfig, Trainer
from ms_profile.flops import FlopMeter, Flops
from support.ranks import run_ranks

SHAPE = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "seq_length": 16,
    "vocab_size": 61,
    "make_vocab_size_divisible_by": 64,
    "micro_batch_size": 2,
    "global_batch_size": 4,
}
LLAMA = {
    "normalization": "RMSNorm",
    "swiglu": True,
    "add_bias_linear": False,
    "num_query_groups": 2,
    "ffn_hidden_size": 88,
    "untie_embeddings_and_output_weights": True,
}
MOE = {
    **LLAMA,
    "num_experts": 4,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 48,
    "moe_token_dispatcher_type": "alltoall",
}
MODELS = {"gpt": {}, "llama": LLAMA, "moe": MOE}
FULL = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}
SELECTIVE = {"recompute_granularity": "selective", "recompute_modules": ("core_attn",)}


@dataclass(frozen=True)
class Terms:
    """Forward FLOPs of one step, written out from the architecture."""

    core: int
    layers: int
    head: int

    @property
    def forward(self):
        return self.core + self.layers + self.head


def terms(name):
    options = {**SHAPE, "num_query_groups": 4, "ffn_hidden_size": 128, **MODELS[name]}
    tokens = options["global_batch_size"] * options["seq_length"]
    hidden, layers = options["hidden_size"], options["num_layers"]
    width = hidden // options["num_attention_heads"]
    qkv = 2 * tokens * hidden * (hidden + 2 * options["num_query_groups"] * width)
    out = 2 * tokens * hidden * hidden
    # Level 0 multiplies the whole score matrix and masks it afterwards.
    core = 2 * 2 * tokens * options["seq_length"] * hidden
    products = 3 if options.get("swiglu") else 2
    if "num_experts" in options:
        copies, ffn = options["moe_router_topk"], options["moe_ffn_hidden_size"]
        router = 2 * tokens * hidden * options["num_experts"]
    else:
        copies, ffn, router = 1, options["ffn_hidden_size"], 0
    mlp = 2 * tokens * hidden * ffn * products * copies + router
    return Terms(layers * core, layers * (qkv + out + mlp), 2 * tokens * hidden * 64)


def megatron_formula(name):
    """What Megatron-LM prints: no router, half of the score matrix, everything three times."""
    options = {**SHAPE, "num_query_groups": 4, "ffn_hidden_size": 128, **MODELS[name]}
    batch, length = options["global_batch_size"], options["seq_length"]
    hidden, layers = options["hidden_size"], options["num_layers"]
    query = hidden
    key_value = 2 * hidden * options["num_query_groups"] // options["num_attention_heads"]
    attention = hidden * (query + key_value) + query * length + query * hidden
    ffn = options["ffn_hidden_size"]
    if "num_experts" in options:
        ffn = options["moe_ffn_hidden_size"] * options["moe_router_topk"]
    mlp = hidden * ffn * (3 if options.get("swiglu") else 2)
    return 3 * 2 * batch * length * (layers * (attention + mlp) + hidden * 64)


def counted(options, kinds=("model",)):
    """Counts of one optimizer step of this rank, one for each kind of attention count."""
    meters = {kind: FlopMeter(attention=kind, by_module=False) for kind in kinds}
    with Trainer(TrainConfig.of(**SHAPE, **options)) as trainer, ExitStack() as stack:
        for meter in meters.values():
            stack.enter_context(meter)
        trainer.train_step()
    assert all(meter.counts.other == 0 for meter in meters.values())
    return [meter.counts for meter in meters.values()]


def without_output():
    """A product behind Megatron's checkpoint that drops its output and recomputes it in a hook."""
    from megatron.core.tensor_parallel.random import CheckpointWithoutOutput

    meter, weight = FlopMeter(), torch.ones(8, 8, requires_grad=True)
    with Trainer(TrainConfig.of(**SHAPE)), meter:
        again = CheckpointWithoutOutput()
        y = again.checkpoint(lambda x: x @ weight, torch.ones(4, 8, requires_grad=True))
        z = y.sin()
        again.discard_output_and_register_recompute(z)
        z.sum().backward()
    return meter.counts


def one_process(rank, world_size):
    found = {"without output": without_output()}
    for name, options in MODELS.items():
        [found[name, "plain"]] = counted(options)
        [found[name, "full bf16"]] = counted({**options, **FULL, "bf16": True})
        if name == "gpt":
            [found[name, "selective"]] = counted({**options, **SELECTIVE})
        kinds = ("model", "launched", "full")
        level1 = counted({**options, "optimization_level": 1}, kinds)
        found |= {(name, f"level1 {kind}"): each for kind, each in zip(kinds, level1, strict=True)}
    return found


@pytest.fixture(scope="module")
def single():
    return run_ranks(one_process, 1, preload="megatron", timeout=180)[0]


@pytest.mark.parametrize("name", MODELS)
def test_closed_form(single, name):
    expected = terms(name)
    whole = expected.core + expected.layers
    recompute = {"plain": 0, "full bf16": whole, "selective": expected.core}
    for label in recompute if name == "gpt" else ("plain", "full bf16"):
        counts = single[name, label]
        assert counts == Flops(expected.forward, 2 * expected.forward, recompute[label]), label


def test_checkpoint_without_output(single):
    product = 2 * 4 * 8 * 8
    assert single["without output"] == Flops(product, 2 * product, product)


@pytest.mark.parametrize("name", MODELS)
def test_megatrons_formula(single, name):
    """With the fused attention of level 1 the count is Megatron's, but for the router."""
    from mindspeed.features.profile.formula import step_formula

    options = {**SHAPE, **MODELS[name]}
    router = 0
    if name == "moe":
        tokens = SHAPE["global_batch_size"] * SHAPE["seq_length"]
        router = 3 * 2 * tokens * SHAPE["hidden_size"] * MOE["num_experts"] * SHAPE["num_layers"]
    expected = megatron_formula(name)
    assert single[name, "level1 model"].model == expected + router
    core = terms(name).core
    whole = expected + router + 3 * core // 2
    assert single[name, "level1 full"].model == single[name, "plain"].model == whole
    assert single[name, "level1 launched"].model == expected + router + core // 4
    values = TrainConfig.of(**options).plan_values()
    assert step_formula(values)(SHAPE["global_batch_size"]) == expected


LAYOUTS = {
    "dp2": ("gpt", {}),
    "tp2 sp": ("llama", {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "pp2 recompute": ("gpt", {"pipeline_model_parallel_size": 2, **FULL}),
    "ep2": ("moe", {"expert_model_parallel_size": 2}),
}


def every_layout(rank, world_size):
    found = {}
    for label, (name, more) in LAYOUTS.items():
        [found[label]] = counted({**MODELS[name], **more})
    return found


def test_ranks_add_up_to_one_process():
    ranks = run_ranks(every_layout, 2, preload="megatron", timeout=180)
    for label, (name, _) in LAYOUTS.items():
        summed = [
            sum(getattr(rank[label], phase) for rank in ranks)
            for phase in ("forward", "backward", "recompute")
        ]
        form = terms(name)
        again = form.core + form.layers if "recompute" in label else 0
        assert summed == [form.forward, 2 * form.forward, again], label
        assert all(rank[label].forward for rank in ranks), label
