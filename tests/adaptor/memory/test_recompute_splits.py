"""Recomputed activations and norms beside every way to divide a model: bit-equal, in four ranks."""

import pytest

from support.memory_runs import config
from support.mutation import Mutation
from support.ranks import run_ranks

pytestmark = pytest.mark.megatron014

FLAGS = {"recompute_norm": True, "recompute_activation_function": True}
DROPOUT = {"attention_dropout": 0.1, "hidden_dropout": 0.1, "global_batch_size": 8}
EXPERTS = {
    "num_experts": 4,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 24,
    "moe_shared_expert_intermediate_size": 40,
    "moe_aux_loss_coeff": 0.1,
    "moe_grouped_gemm": True,
    "bf16": True,
}
FOUR = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
STAGES = {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}
OPTIMIZER = {"use_distributed_optimizer": True, "overlap_grad_reduce": True}
# Name -> (options of both runs, flags of one).
SPLITS = {
    "tensor": ({**FOUR, **OPTIMIZER}, FLAGS),
    "virtual": (
        {
            **STAGES,
            "num_layers": 8,
            "swiglu": False,
            "normalization": "LayerNorm",
            "add_bias_linear": True,
            "bf16": True,
        },
        {
            **FLAGS,
            "recompute_granularity": "full",
            "recompute_method": "block",
            "recompute_num_layers": 1,
            "recompute_activation_function_num_layers": 1,
            "recompute_norm_num_layers": 2,
            "enable_recompute_layers_per_pp_rank": True,
        },
    ),
    "experts": (
        {
            **EXPERTS,
            "gemm_gradient_accumulation_fusion": True,
            "expert_model_parallel_size": 2,
            "context_parallel_size": 2,
            "attention_dropout": 0.0,
        },
        FLAGS,
    ),
}
NOT_FROM_THE_CHUNK = Mutation(
    "numbers of whole layers do not count from the chunk",
    "mindspeed.features.memory.recompute.layers:_count_per_rank",
    "recompute_num_layers - chunk",
    "recompute_num_layers",
)


def splits(rank, world_size):
    from mindspeed.features.memory.session import open_sessions
    from mindspeed.train.model import unwrap
    from mindspeed.train.trainer import Trainer

    found = {}
    for name, (options, flags) in SPLITS.items():
        for kind, given in (("plain", {}), ("ours", flags)):
            with Trainer(config({**DROPOUT, **options, **given})) as trainer:
                results = [trainer.train_step() for _ in range(2)]
                found[name, kind] = [(r.loss, r.grad_norm) for r in results]
                sessions = {s.model: s for s in open_sessions()}
                if name == "virtual" and given:
                    found["chunks"] = [places(sessions[unwrap(c)]) for c in trainer.chunks]
                if kind == "ours":
                    found[name, "evaluated"] = trainer.evaluate(1)
        assert not open_sessions()
    options, flags = SPLITS["virtual"]
    with NOT_FROM_THE_CHUNK.applied(), Trainer(config({**DROPOUT, **options, **flags})) as trainer:
        found["wrong"] = [unwrap(c).decoder.config.recompute_num_layers for c in trainer.chunks]
    return found


def places(session):
    """Return the layers that a chunk recomputes as a whole, and what it recomputes in others."""
    block = session.model.decoder
    parts = [a.module.removeprefix("decoder.layers.") for a in session.report().actions]
    return block.config.recompute_num_layers, parts


def test_every_split_is_bit_equal():
    ranks = run_ranks(splits, 4, preload="megatron", timeout=120)
    for found in ranks:
        for name in SPLITS:
            assert found[name, "ours"] == found[name, "plain"], name
            assert found[name, "evaluated"] == ranks[0][name, "evaluated"]
        norms = ["input_layernorm", "pre_mlp_layernorm"]
        # Of a rank's four layers, 0 and 2 in the first chunk, 1 and 3 in the second: whole, then
        # activations in one, norms in two.
        assert found["chunks"] == [
            (1, [f"1.{n}" for n in norms]),
            (0, ["0.mlp", *(f"0.{n}" for n in norms)]),
        ]
        assert found["wrong"] != [1, 0]
