"""What Megatron's layers keep for backward, plain, divided and recomputed, equals the table.

Notation: `n` tokens, `h` width, `kv` width of keys or values, `f` hidden width, `a` heads, `w`
bytes of an element, `t` tensor-parallel ranks.
"""

from contextlib import nullcontext
from dataclasses import dataclass

import pytest

from mindspeed.train.config import TrainConfig
from ms_profile.memory import MemoryMeter, saved_bytes
from support.ranks import run_ranks

# Megatron compiles a few small functions; eager ones compute the same and start at once.
EAGER = {"TORCHDYNAMO_DISABLE": "1"}
S, B, H, HEADS = 24, 2, 32, 4
BASE = {
    "num_layers": 2,
    "hidden_size": H,
    "num_attention_heads": HEADS,
    "seq_length": S,
    "micro_batch_size": B,
}
LLAMA = {
    "normalization": "RMSNorm",
    "swiglu": True,
    "add_bias_linear": False,
    "num_query_groups": 2,
    "optimization_level": 1,
}
GPT = {"optimization_level": 1}
TP = {"tensor_model_parallel_size": 2}
SP = {**TP, "sequence_parallel": True}
FULL = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}
SELECTIVE = {"recompute_granularity": "selective"}
CASES = {
    "gpt": GPT,
    "gpt, sp": {**GPT, **SP},
    "gpt without fused operators, sp": {"optimization_level": 0, **SP},
    "llama, tp": {**LLAMA, **TP},
    "llama in bf16": {**LLAMA, "bf16": True},
    "llama in bf16, sp": {**LLAMA, **SP, "bf16": True},
    "llama, sp, selective": {**LLAMA, **SP, **SELECTIVE},
    "llama, sp, full": {**LLAMA, **SP, **FULL},
}
BY_HOOKS = "llama in bf16, sp"  # measured with one layer less as well
LEAK = {**LLAMA, **TP}


@dataclass
class Found:
    """What one rank measured in a step.

    Attributes:
        layers: bytes kept by layer number.
        hooks: all bytes kept, by saved-tensor hooks.
        leaks: bytes alive after the step that modules made and nobody is known to hold.
    """

    layers: dict
    hooks: int
    leaks: list


def by_layer(meter, layers):
    """Sums by the number in a module's path; Megatron's unregistered Softmax belongs to all."""
    found = dict.fromkeys(range(layers), 0)
    for path, row in meter.as_dict()["by_module"].items():
        if ".layers." in path:
            found[int(path.split(".layers.")[1].split(".")[0])] += row["saved"]
        elif path.endswith("Softmax"):
            for number in found:
                found[number] += row["saved"] // layers
    return found


def train_step(rank, world_size, cases):
    """Return what each case keeps in its second step."""
    return {name: measure(name, TrainConfig.of(**{**BASE, **cases[name]})) for name in cases}


def measure(name, config):
    from mindspeed.train.model import unwrap
    from mindspeed.train.trainer import Trainer

    kept_on = []
    by_hooks = name.startswith(BY_HOOKS)
    with Trainer(config) as trainer:
        chunk = trainer.chunks[0]
        if name == "leak":
            layer = chunk.module.decoder.layers[1].mlp.linear_fc1
            layer.register_forward_hook(lambda module, args, out: kept_on.append(out[0]))
        # The first step also makes what stays for good: optimizer states, rotary tables, buffers.
        with saved_bytes(exclude=unwrap(chunk)) if by_hooks else nullcontext() as hooks:
            trainer.train_step()
        kept_on.clear()
        with MemoryMeter(chunk) as meter:
            trainer.train_step()
            # Outside of modules the last collective may still hold its buffer for a moment.
            leaks = [
                (each.nbytes, each.birth.module) for each in meter.leaks() if each.birth.module
            ]
        layers = by_layer(meter, config.model.num_layers)
        return Found(layers, hooks.peak if by_hooks else 0, leaks)


def table(options):
    """Bytes that one layer keeps: the rows of the table, with its divisions."""
    options = {**BASE, **options}
    config = TrainConfig.of(**options)
    w = 2 if config.precision.bf16 else 4
    t = config.parallel.tensor_model_parallel_size
    tokens = n = S * B
    if config.parallel.sequence_parallel:
        tokens //= t
    full, selective = (config.recompute.recompute_granularity == g for g in ("full", "selective"))
    layer_input = w * tokens * H
    if full:
        return layer_input
    llama, fused = config.model.swiglu, config.optimization_level == 1
    kv = H // HEADS * (config.model.num_query_groups or HEADS)
    statistics = 4 * tokens if llama else 2 * w * tokens
    norms = 2 * (layer_input + layer_input + statistics)  # input and output each
    rotated = w * n * (H + kv) // t
    # The value is a view of the whole product, so that its queries and keys stay as well.
    qkv = w * n * (H + 2 * kv) // t + rotated
    attention = w * n * H // t  # its result; also the input of the output projection
    f = config.ffn_hidden_size
    mlp = w * n * (3 if llama else 2) * f // t
    if not fused:
        # Rotary tables for queries and keys, the mask, the probabilities.
        scores = 4 * w * S * (H // HEADS) + S * S + w * B * HEADS * S * S // t
    elif selective:
        scores = 4  # one number of the random state's replay
    else:
        scores = 4 * n * HEADS // t  # log-sum-exp
    return norms + qkv + attention + scores + mlp


@pytest.fixture(scope="module")
def measured():
    one_layer = {f"{BY_HOOKS}, one layer": {**CASES[BY_HOOKS], "num_layers": 1}}
    cases = {**CASES, **one_layer, "leak": LEAK}
    return run_ranks(train_step, 2, cases, preload="megatron", env=EAGER, timeout=240)


@pytest.mark.parametrize("name", CASES)
def test_a_layer_keeps_what_the_table_says(measured, name):
    for rank in measured:
        assert rank[name].layers == {0: table(CASES[name]), 1: table(CASES[name])}
        assert rank[name].leaks == []


def test_hooks_count_the_same_for_the_second_layer(measured):
    for rank in measured:
        two, one = rank[BY_HOOKS], rank[f"{BY_HOOKS}, one layer"]
        assert two.hooks - one.hooks == table(CASES[BY_HOOKS])


def test_a_tensor_that_is_kept_on_is_a_leak(measured):
    for rank in measured:
        ((nbytes, module),) = rank["leak"].leaks
        assert nbytes == 4 * S * B * 2 * TrainConfig.of(**BASE, **LEAK).ffn_hidden_size // 2
        assert module.endswith("layers.1.mlp.linear_fc1")
