"""Training with a divided sequence equals training with a whole one, whatever else is divided."""

import pytest

from mindspeed.train.config import TrainConfig
from support.ranks import run_ranks

SMALL = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "seq_length": 64,
    "micro_batch_size": 1,
    "global_batch_size": 2,
    "init_method_std": 0.2,
    "swiglu": True,
    "normalization": "RMSNorm",
    "add_bias_linear": False,
    "optimization_level": 2,
}
RING = {"context_parallel_algo": "megatron_cp_algo"}
HYBRID = {"context_parallel_algo": "hybrid_cp_algo", "ulysses_degree_in_cp": 2}
ALONE = {
    "plain": {},
    "learned": {"position_embedding_type": "learned_absolute"},
    # Gradients of several micro-batches on each data-parallel rank.
    "alibi": {"position_embedding_type": "alibi", "global_batch_size": 4},
    "window": {"pre_tokens": 9, "sparse_mode": 4},
    "deep": {"num_layers": 4},
    "experts": {"num_experts": 4, "moe_router_topk": 2, "moe_aux_loss_coeff": 0.1},
}
FOUR = {"context_parallel_size": 4}
TWO = {"context_parallel_size": 2}
OPTIMIZER = {"use_distributed_optimizer": True}
# Name -> (the run of one process that it equals, its flags).
DIVIDED = {
    "windows, half kept, recomputed": (
        "plain",
        {
            **FOUR,
            **RING,
            "cp_window_size": 2,
            "use_cp_send_recv_overlap": True,
            "context_parallel_kv_cache_policy": "half",
            "context_parallel_cache_interval": 1,
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
        },
    ),
    "half of ulysses": ("plain", {**FOUR, "context_parallel_kv_cache_policy": "half"}),
    "hybrid": ("learned", {**FOUR, **HYBRID}),
    "adaptive": ("window", {**FOUR, "context_parallel_algo": "adaptive_cp_algo"}),
    "tensor": ("plain", {**TWO, "tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "virtual pipeline": (
        "deep",
        {
            **TWO,
            **RING,
            "pipeline_model_parallel_size": 2,
            "virtual_pipeline_model_parallel_size": 2,
        },
    ),
    "data": (
        "alibi",
        {
            **TWO,
            **OPTIMIZER,
            "context_parallel_algo": "kvallgather_cp_algo",
            "overlap_grad_reduce": True,
            "overlap_param_gather": True,
        },
    ),
    "experts": (
        "experts",
        {**TWO, **RING, "expert_model_parallel_size": 2, "moe_token_dispatcher_type": "alltoall"},
    ),
}


def config(options):
    leaves = TrainConfig().flat()
    native = {name: value for name, value in options.items() if name in leaves}
    flags = tuple(sorted((k, v) for k, v in options.items() if k not in leaves))
    return TrainConfig.of(**{**SMALL, **native}, feature_flags=flags)


def losses(rank, world_size, runs, folder, load=None):
    """Train two steps each; the run that `load` names starts from what "data" saved."""
    from mindspeed.train.trainer import Trainer

    found = {}
    for name, options in runs.items():
        with Trainer(config(options)) as trainer:
            if name == load:
                trainer.load(folder, reshard=True)
            # Recomputed attention would count twice.
            measure = name in ("hybrid", "learned")
            results = [trainer.train_step(measure=measure and n == 1) for n in range(2)]
            if name == "data":
                trainer.save(folder)
            found[name] = [(r.loss, r.grad_norm, r.tokens) for r in results]
            if measure:
                found["flops"] = results[1].measured.model_flops
            if name in ("data", "alibi"):
                found[f"{name} after"] = [trainer.train_step().loss, trainer.evaluate(1)]
    return found


def test_every_algorithm_and_combination_equals_one_process(tmp_path):
    runs = {name: {**ALONE[same], **options} for name, (same, options) in DIVIDED.items()}
    ranks = run_ranks(losses, 4, runs, tmp_path, preload="megatron")
    assert all(found == ranks[0] for found in ranks)
    resumed = {"resumed": {**ALONE["alibi"], **OPTIMIZER}}
    all_runs = {**ALONE, **resumed}
    (alone,) = run_ranks(losses, 1, all_runs, tmp_path, "resumed", preload="megatron")
    for name, (same, _) in DIVIDED.items():
        for step, (got, want) in enumerate(zip(ranks[0][name], alone[same], strict=True)):
            assert got == pytest.approx(want, rel=3e-6), (name, step)
    assert ranks[0]["flops"] == alone["flops"]
    assert ranks[0]["data after"] == pytest.approx(alone["alibi after"], rel=3e-6)
    assert alone["resumed"][0][0] == pytest.approx(alone["alibi after"][0], rel=3e-6)
    assert alone["plain"][0] != pytest.approx(alone["window"][0], rel=1e-4)


def packed_model(rank, world_size, runs):
    """Return losses and gradient sums of a model on packed documents, by algorithm."""
    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.utils import get_batch_on_this_cp_rank

    import mindspeed
    from mindspeed.train.model import build_chunks

    found = {}
    tokens = torch.randint(1, 50, (2, 64), generator=torch.Generator().manual_seed(3))
    tokens[0, [4, 5, 37]] = tokens[1, [0, 63]] = 0
    lone = torch.ones(2, 64, 64, dtype=torch.bool).tril()
    number = torch.cumsum(tokens == 0, 1) - (tokens == 0).long()
    mask = ~(lone & (number.unsqueeze(2) == number.unsqueeze(1))).unsqueeze(1)
    first = torch.searchsorted(number.contiguous(), number.contiguous())
    batch = {
        "tokens": tokens,
        "labels": tokens.roll(-1, 1),
        "position_ids": torch.arange(64) - first,
        "attention_mask": mask,
    }
    for name, options in runs.items():
        made = config({**options, "micro_batch_size": 2})
        parallel_state.initialize_model_parallel(context_parallel_size=world_size)
        torch.manual_seed(1)
        values = {**made.plan_values(), "reset_attention_mask": world_size > 1}
        with mindspeed.activate(values, level=2):
            from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

            model_parallel_cuda_manual_seed(1)
            (model,) = build_chunks(made)
            if world_size > 1 and name != "dense":
                model.config.end_of_document = 0
            mine = get_batch_on_this_cp_rank(dict(batch))
            mask = None if name == "one document" else mine["attention_mask"]
            lost = model(mine["tokens"], mine["position_ids"], mask, labels=mine["labels"]).sum()
            lost.backward()
            sums = [lost.detach(), *(p.grad for p in model.parameters())]
            for each in sums:
                dist.all_reduce(each)
            found[name] = [float(each.norm()) for each in sums]
        parallel_state.destroy_model_parallel()
    return found


def test_packed_documents_equal_their_mask_under_every_algorithm():
    learned = {"position_embedding_type": "learned_absolute"}
    four = {**FOUR, **learned}
    runs = {"ulysses": four, "dense": {**four, **RING}, "hybrid": {**four, **HYBRID}}
    both = {"packed": learned, "one document": learned}
    (alone,) = run_ranks(packed_model, 1, both, preload="megatron")
    assert alone["packed"] != pytest.approx(alone["one document"], rel=1e-3)
    ranks = run_ranks(packed_model, 4, runs, preload="megatron")
    for name in runs:
        assert ranks[0][name] == pytest.approx(alone["packed"], rel=2e-5, abs=1e-5), name


def latent_model(rank, world_size):
    """Return losses and gradient norms of multi-latent attention, plain and YaRN positions."""
    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.utils import get_batch_on_this_cp_rank

    import mindspeed
    from mindspeed.train.initial import initialize_by_name

    mindspeed.activate({"context_parallel_size": world_size}, level=2)
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_config import MLATransformerConfig

    parallel_state.initialize_model_parallel(context_parallel_size=world_size)
    model_parallel_cuda_manual_seed(1)
    tokens = torch.randint(0, 64, (2, 33), generator=torch.Generator().manual_seed(1))
    places = torch.arange(32).expand(2, -1)
    whole = {"tokens": tokens[:, :-1], "labels": tokens[:, 1:], "position_ids": places}
    batch = get_batch_on_this_cp_rank(whole)
    sizes = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4}
    lora = {"q_lora_rank": 16, "kv_lora_rank": 12, "original_max_position_embeddings": 16}
    heads = {"qk_head_dim": 8, "qk_pos_emb_head_dim": 4, "v_head_dim": 6}
    found = {}
    for kind in ("rope", "yarn"):
        config = MLATransformerConfig(
            **sizes, **lora, **heads, rope_type=kind, multi_latent_attention=True,
            hidden_dropout=0.0, attention_dropout=0.0, use_cpu_initialization=True,
            init_method_std=0.2, bias_dropout_fusion=False, context_parallel_size=world_size,
        )  # fmt: skip
        spec = get_gpt_layer_local_spec(multi_latent_attention=True)
        model = GPTModel(config, spec, 64, 32, position_embedding_type="none")
        initialize_by_name([model], config, 7)
        lost = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"]).sum()
        lost.backward()
        sums = [lost.detach(), *(p.grad for p in model.parameters())]
        for each in sums:
            dist.all_reduce(each)
        found[kind] = [float(each.norm()) for each in sums]
    return found


def test_latent_attention_equals_one_process():
    (alone,) = run_ranks(latent_model, 1, preload="megatron")
    for found in run_ranks(latent_model, 2, preload="megatron"):
        for kind, wanted in alone.items():
            assert found[kind] == pytest.approx(wanted, rel=2e-5, abs=1e-5), kind
