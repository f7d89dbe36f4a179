"""A budget in Megatron: training is the same bit for bit, and stays within it."""

import json

import pytest

from mindspeed.train.config import TrainConfig
from support.mutation import Mutation
from support.ranks import run_ranks

SMALL = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "seq_length": 32,
    "vocab_size": 61,
    "make_vocab_size_divisible_by": 64,
    "micro_batch_size": 2,
    "global_batch_size": 8,
    "swiglu": True,
    "normalization": "RMSNorm",
    "add_bias_linear": False,
    "untie_embeddings_and_output_weights": True,
    "optimization_level": 2,
    "hidden_dropout": 0.1,
    "attention_dropout": 0.1,
}
BUDGET = {"memory_budget": "80%", "memory_actions": "recompute"}
# Little to measure, and nothing to do.
ROOMY = {"memory_budget": "100%", "memory_actions": "discard"}
EXPERTS = {"num_experts": 4, "moe_router_topk": 2, "moe_aux_loss_coeff": 0.1}


def config(options):
    leaves = TrainConfig().flat()
    native = {name: value for name, value in options.items() if name in leaves}
    flags = tuple(sorted((k, v) for k, v in options.items() if k not in leaves))
    return TrainConfig.of(**{**SMALL, **native}, feature_flags=flags)


def trained(options, steps=2):
    """Losses of some steps; what the planner decided and what the last step measured."""
    from mindspeed.train.trainer import Trainer

    with Trainer(config(options)) as trainer:
        results = [trainer.train_step(measure=n == steps - 1 > 0) for n in range(steps)]
        made = trainer.memory_plan()
        losses = [(r.loss, r.grad_norm, r.tokens) for r in results]
        plan = None if made is None else json.loads(json.dumps(made.plan.as_dict()))
        left = 0 if made is None else made.workspaces
        measured = results[-1].measured
        peak = left + (0 if measured is None else measured.tensor_bytes)
        return losses, plan, peak, left, results[-1].notes, str(made)


MUTANTS = {
    "a batch is lost": Mutation(
        "a batch is lost",
        "mindspeed.features.memory.planner.schedule:_planning",
        '"data_iterator": batches.trained()',
        '"data_iterator": call["data_iterator"]',
    ),
    "gradients are left": Mutation(
        "gradients are left",
        "mindspeed.features.memory.planner.step:_gradients",
        "grads.zero_",
        "(lambda: None)",
    ),
}


def outgrown():
    """What becomes of a plan when a longer sequence comes, and of one that shares experts."""
    import torch

    from mindspeed.features.memory.session import session_of
    from mindspeed.train.trainer import Trainer

    with Trainer(config(ROOMY)) as trainer:
        trainer.train_step()
        (model,) = trainer.chunks
        tokens = torch.zeros(2, 40, dtype=torch.long)
        before = session_of(model)
        for experts in (2, 1):
            model.config.expert_model_parallel_size = experts
            try:
                model(tokens, tokens, None, labels=tokens).sum().backward()
            except ValueError as error:
                refused = str(error)
        after = session_of(model)
        return refused, before is after, before.closed, [a.module for a in after.actions]


def alone(rank, world_size):
    found = {"plain": trained({}), "planned": trained(BUDGET)}
    found["experts"] = trained(EXPERTS), trained({**EXPERTS, **BUDGET, "memory_budget": "90%"})
    mutants = {}
    for name, mutation in MUTANTS.items():
        with mutation.applied():
            mutants[name] = trained(ROOMY, steps=1)[0]
    found["outgrown"] = outgrown()
    return found, mutants


def test_one_process():
    ((found, mutants),) = run_ranks(alone, 1, preload="megatron")
    losses, _, unplanned, *_ = found["plain"]
    planned, plan, measured, left, notes, text = found["planned"]
    assert planned == losses
    assert all(mutant != losses[:1] for mutant in mutants.values()), mutants
    # The meter does not see what was there before: workspaces, states of three random streams.
    unseen = left + 3 * 5056
    assert max(plan["unplanned"]) == pytest.approx(unplanned + unseen, rel=1e-3)
    assert measured <= plan["budget"] == int(0.8 * max(plan["unplanned"]))
    assert measured == pytest.approx(plan["peak"], rel=0.03)
    assert notes[-1].startswith("memory of stage 0: budget ")
    assert "more than" not in notes[-1]
    assert "layers.0" in text
    assert "measured in one micro-step" in text
    assert {d["option"]["name"] for d in plan["decisions"]} != {"keep"}
    refused, *fallen_back = found["outgrown"]
    assert refused.startswith("E-M23: ")
    assert fallen_back == [False, True, ["decoder.layers.0", "decoder.layers.1"]]
    plain, planned = found["experts"]
    assert planned[0] == plain[0]
    assert planned[2] <= planned[1]["budget"]


STAGES = {
    "num_layers": 4,
    "tensor_model_parallel_size": 2,
    "sequence_parallel": True,
    "pipeline_model_parallel_size": 2,
    "virtual_pipeline_model_parallel_size": 2,
    "use_distributed_optimizer": True,
    "overlap_grad_reduce": True,
    "overlap_param_gather": True,
}
STAGES_BUDGET = {
    "memory_budget": "80%",
    "memory_actions": "recompute",
    "memory_pins": "layers.3=recompute",
}
SEED_LEFT = Mutation(
    "random states are left",
    "mindspeed.features.memory.planner.step:as_found",
    "[*_random_states(), *_logs()]",
    "[*_logs()]",
)


def divided(rank, world_size):
    found = {"plain": trained(STAGES), "planned": trained({**STAGES, **STAGES_BUDGET})}
    with SEED_LEFT.applied():
        found["mutant"] = trained({**STAGES, **ROOMY}, steps=1)[0]
    try:
        trained({**STAGES, **ROOMY, "memory_budget": "100000"}, steps=1)
    except ValueError as error:
        found["refused"] = str(error)
    return found


def test_four_processes():
    ranks = run_ranks(divided, 4, preload="megatron")
    plans = [rank["planned"][1] for rank in ranks]
    # Ranks 0 and 1 are the first stage, 2 and 3 the second.
    digests = [plan["digest"] for plan in plans]
    assert digests[0] == digests[1] != digests[2] == digests[3]
    for rank in ranks:
        losses, planned = rank["plain"][0], rank["planned"]
        assert planned[0] == losses
        assert rank["mutant"] != losses[:1]
        # Measured and budget of both stages, the same on every rank.
        notes = planned[4]
        assert [note[:18] for note in notes] == ["memory of stage 0:", "memory of stage 1:"]
        assert not any("more than the budget" in note for note in notes), notes
        assert rank["refused"].startswith("E-M30: the budget is too small: 100,000 bytes; the")
        assert rank["refused"].endswith("(pipeline stage 0)")
    decided = {d["site"]: d["option"]["name"] for d in plans[2]["decisions"]}
    assert list(decided) == [
        "before the layers of chunk 0",
        "layers.1",
        "after the layers of chunk 0",
        "before the layers of chunk 1",
        "layers.3",
        "after the layers of chunk 1",
    ]
    assert decided["layers.3"] == "recompute"
    assert "layers.3" not in {d["site"] for d in plans[0]["decisions"]}
