"""What cannot be combined with a divided sequence, one line a rule, before any process starts."""

import re
import sys
from types import ModuleType, SimpleNamespace

import pytest

import mindspeed
from mindspeed.features.context import adaptive, algorithm, documents, hybrid, kv_cache, ring
from mindspeed.features.context.settings import ContextSettings
from mindspeed.train.args import parse
from mindspeed.train.config import TrainConfig
from mindspeed.train.validate import ConfigError, check

FOUR = {"context_parallel_size": 4}
RING = {**FOUR, "context_parallel_algo": "megatron_cp_algo"}
HYBRID = {**FOUR, "context_parallel_algo": "hybrid_cp_algo"}
NODES = {**HYBRID, "ulysses_degree_in_cp": 2}
TASKS = {**FOUR, "context_parallel_algo": "adaptive_cp_algo"}
GENERAL = {"attention_mask_type": "general", "create_attention_mask_in_dataloader": True}
DOCUMENTS = {**FOUR, "reset_attention_mask": True, "pipeline_model_parallel_size": 2}
ALIBI = {"position_embedding_type": "alibi"}
HEADS = {"num_attention_heads": 12, "num_query_groups": 12}

REFUSED = [
    ({"context_parallel_algo": "megatron_cp_algo"}, "the sequence is not divided"),
    ({"context_parallel_uneven_heads": True}, "the sequence is not divided"),
    ({**FOUR, "seq_length": 100}, "multiple of 8; near by: 96, 104"),
    (HYBRID, "needs --ulysses-degree-in-cp .* for 4 ranks: 2"),
    ({**FOUR, "ulysses_degree_in_cp": 2}, "without a hybrid algorithm"),
    ({**RING, "ulysses_degree_in_cp": 2}, "without a hybrid algorithm"),
    ({**HYBRID, "ulysses_degree_in_cp": 3}, "make up all ranks .*for 4 ranks: 2"),
    ({**HYBRID, "ulysses_degree_in_cp": 4}, "With one node take ulysses_cp_algo"),
    ({**HYBRID, "ulysses_degree_in_cp": 1}, "with nodes of one megatron_cp_algo"),
    ({**RING, "cp_window_size": 0}, "for a ring of 4: 1, 2"),
    ({**RING, "cp_window_size": 3}, "for a ring of 4: 1, 2"),
    ({**RING, "cp_window_size": 4}, "for a ring of 4: 1, 2"),
    ({**NODES, "cp_window_size": 2}, "nodes of .* for a ring of 2: 1"),
    ({**FOUR, "cp_window_size": 2}, "--cp-window-size is about a ring"),
    ({**TASKS, "use_cp_send_recv_overlap": True}, "--use-cp-send-recv-overlap is about a ring"),
    ({"use_fused_ring_attention_update": True}, "--use-fused-ring-attention-update is about a"),
    (
        {**FOUR, **HEADS, "tensor_model_parallel_size": 2},
        "6 heads a tensor-parallel rank go into 1, 2, the nearest to 4 is 2",
    ),
    (
        {**HYBRID, "context_parallel_size": 8, "ulysses_degree_in_cp": 8, **HEADS},
        "the nearest to 8 is 4",
    ),
    ({**FOUR, "num_attention_heads": 12, "num_query_groups": 5}, "no multiple of key and value"),
    ({**FOUR, **ALIBI, **GENERAL}, "a bias of ALiBi with signs needs a causal mask"),
    ({**FOUR, "use_legacy_models": True}, "legacy models cannot divide"),
    ({"context_parallel_kv_cache_policy": "full"}, "this one is not divided"),
    ({**RING, "context_parallel_cache_interval": 1}, "belongs to a policy"),
    (
        {
            **RING,
            "context_parallel_kv_cache_policy": "full",
            "context_parallel_cache_interval": 12,
            "num_layers": 12,
        },
        r"must lie in \[0, --num-layers\)",
    ),
    ({**RING, "use_ulysses_allgather_kv": True}, "is a form of ulysses_cp_algo"),
    ({**FOUR, "use_ulysses_allgather_kv": True, "num_query_groups": 2}, "one key and value head"),
    ({**FOUR, "attention_mask_on_cpu": True}, "--attention-mask-on-cpu needs"),
    ({**RING, "adaptive_cp_without_coarse": True}, "--adaptive-cp-without-coarse needs"),
    ({**TASKS, "adaptive_cp_dynamic_attn_mask": True}, "--adaptive-cp-dynamic-attn-mask needs"),
    ({**FOUR, "adaptive_cp_only_reschedule": True}, "--adaptive-cp-only-reschedule needs"),
    ({**TASKS, "adaptive_cp_manually_set_mask_list": True}, "each rank finds its part"),
    ({**RING, "megatron_cp_in_bnsd": True}, "the layout is chosen by the attention backend"),
    (
        {**FOUR, "reset_attention_mask": True, "overlap_moe_expert_parallel_comm": True},
        "documents reach the layers through the model's forward",
    ),
    ({**FOUR, "reset_attention_mask": True, "sft": True}, "batches that come packed"),
    ({**DOCUMENTS, "memory_budget": "8GB"}, "the memory planner runs a pipeline stage by itself"),
    (
        {**FOUR, **GENERAL, "pipeline_model_parallel_size": 4},
        "masks come with the batches, which",
    ),
    ({**RING, "sparse_mode": 2, "pre_tokens": 9}, "--sparse-mode 2 is the plain triangle"),
]


@pytest.mark.parametrize(("values", "words"), REFUSED)
def test_refused_with_what_would_be_legal(values, words):
    with pytest.raises(mindspeed.PlanError, match=words):
        mindspeed.plan(values, level=2)


@pytest.mark.parametrize(
    "values",
    [
        FOUR,
        {**RING, "cp_window_size": 2, "use_cp_send_recv_overlap": True},
        {**NODES, "use_fused_ring_attention_update": True},
        {**NODES, "context_parallel_size": 8, "cp_window_size": 2},
        {**FOUR, **HEADS, "tensor_model_parallel_size": 2, "context_parallel_uneven_heads": True},
        {**FOUR, **ALIBI, **GENERAL, "alibi_fusion_attn_type": 2},
        {**FOUR, **ALIBI, **GENERAL, "fill_neg_inf": True},
        {**FOUR, "context_parallel_kv_cache_policy": "half"},
        {**FOUR, "use_ulysses_allgather_kv": True, "num_query_groups": 1},
        {**DOCUMENTS, "virtual_pipeline_model_parallel_size": 2},
        {**TASKS, **GENERAL, "adaptive_cp_dynamic_attn_mask": True, "attention_mask_on_cpu": True},
        {**TASKS, "adaptive_cp_without_coarse": True, "adaptive_cp_only_reschedule": True},
        {**FOUR, **ALIBI, "sparse_mode": 4, "pre_tokens": 9},
        {**FOUR, "reset_attention_mask": True},
    ],
)
def test_served_at_level_2(values):
    plan = mindspeed.plan(values, level=2)
    assert "context.algorithm" in plan.features
    (provider,) = [s for s in plan.acting if s.patch.path == "LocalSpecProvider"]
    assert provider.patch.value.endswith("ContextSpecProvider")


def test_a_whole_sequence_is_level_1s():
    plan = mindspeed.plan({}, level=2)
    assert not any(name.startswith("context.") for name in plan.features)
    (provider,) = [s for s in plan.acting if s.patch.path == "LocalSpecProvider"]
    assert provider.patch.value.endswith("OpsSpecProvider")


def test_lower_levels_refuse_the_flags():
    with pytest.raises(mindspeed.PlanError, match="belongs to optimization level 2"):
        mindspeed.plan(RING, level=1)
    with pytest.raises(ConfigError, match="give --optimization-level 2"):
        check(TrainConfig.of(**FOUR, optimization_level=1), 4)
    check(TrainConfig.of(**FOUR, optimization_level=2), 4)


def test_the_command_takes_every_algorithm():
    for name in ("ulysses", "megatron", "adaptive", "kvallgather"):
        words = ["--context-parallel-size", "4", "--context-parallel-algo", f"{name}_cp_algo"]
        check(parse([*words, "--nproc", "4", "--optimization-level", "2"]).config, 4)
    with pytest.raises(SystemExit):
        parse(["--context-parallel-algo", "unknown_cp_algo"])


def test_a_scripts_configuration_is_told():
    config = SimpleNamespace()
    algorithm.tell(config, {**NODES, "transformer_impl": "local"})
    assert config.context_attention == ContextSettings("usp", 2)
    with pytest.raises(ValueError, match="need 'local': TransformerEngine divides"):
        algorithm.tell(config, {**NODES, "transformer_impl": "transformer_engine"})
    config = SimpleNamespace()
    algorithm.tell(config, {**FOUR, "transformer_impl": "transformer_engine"})
    assert not hasattr(config, "context_attention")


def test_whose_documents_are_told_apart(monkeypatch):
    values = {"reset_attention_mask": True, "attention_mask_type": "causal"}
    training = ModuleType("megatron.training")
    training.get_tokenizer = lambda: SimpleNamespace(eod=5)
    monkeypatch.setitem(sys.modules, "megatron.training", training)
    for changed, wanted in (
        ({}, 5),
        ({"reset_attention_mask": False}, None),
        ({"attention_mask_type": "general"}, None),
        ({"transformer_impl": "transformer_engine"}, None),
    ):
        monkeypatch.setattr(documents, "script_arguments", lambda c=changed: {**values, **c})
        assert documents.end_of_document(SimpleNamespace()) == wanted
    assert documents.end_of_document(SimpleNamespace(end_of_document=7)) == 7


@pytest.mark.parametrize(
    ("advise", "values", "words"),
    [
        (algorithm.advise, {}, "is not divided"),
        (algorithm.advise, FOUR, "costs need --seq-length"),
        (ring.advise, {}, "at their defaults"),
        (
            ring.advise,
            {
                "cp_window_size": 2,
                "use_cp_send_recv_overlap": True,
                "use_fused_ring_attention_update": True,
            },
            "link between groups.*works in order.*attention_merge",
        ),
        (hybrid.advise, NODES, "where links are fast"),
        (kv_cache.advise, RING, "pays where messages take longer"),
        (kv_cache.advise, {**FOUR, "num_query_groups": 8}, "saves no memory"),
        (kv_cache.advise, {**FOUR, "num_query_groups": 2}, "less memory, more exchanged"),
        (adaptive.advise, TASKS, "megatron_cp_algo sends less"),
        (adaptive.advise, {**TASKS, **GENERAL}, "at full resolution"),
        (documents.advise, FOUR, "where documents begin"),
        (documents.advise, DOCUMENTS, "later ones wait for its host"),
        (documents.advise, {**FOUR, **GENERAL}, "slow, and large"),
    ],
)
def test_advice(advise, values, words):
    assert re.search(words, advise(SimpleNamespace(**values)))


def test_the_plan_prints_what_the_choice_and_others_cost():
    model = {"num_attention_heads": 8, "num_query_groups": 2, "hidden_size": 64, "seq_length": 64}
    text = algorithm.advise(SimpleNamespace(**NODES, **model, bf16=True))
    assert "hybrid_cp_algo on 4 ranks, 8 query and 2 key heads a rank, 64 tokens" in text
    # Queries and outputs: half of 16 tokens x 8 heads x 8 channels x 2 bytes; of two key heads,
    # one goes to the other place, k and v: 16 tokens x 8 channels x 2; then the ring sends the
    # head that is here for the 32 tokens of the node.
    size = 2 * 16 * 4 * 8 * 2 + 2 * 16 * 8 * 2 + 2 * 32 * 8 * 2
    assert f"{size / 2**20:.2f} MiB forward" in text
    assert all(word in text for word in ("usp, U = 2", "ulysses", "ring", "allgather_kv"))
    latent = {"multi_latent_attention": True, "qk_head_dim": 16, "v_head_dim": 8}
    assert "8 key heads" in algorithm.advise(SimpleNamespace(**FOUR, **model, **latent))
    wrong = algorithm.advise(SimpleNamespace(**HYBRID, **model, ulysses_degree_in_cp=3))
    assert wrong.startswith("no cost: ")
