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
    "seq_length": 64,
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
EXPERTS = {"num_experts": 4, "moe_router_topk": 2, "moe_aux_loss_coeff": 0.1}
DATA = {
    "use_distributed_optimizer": True,
    "overlap_grad_reduce": True,
    "overlap_param_gather": True,
}


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
        "mindspeed.features.memory.planner_schedule:_planning",
        '"data_iterator": batches.replay()',
        '"data_iterator": call["data_iterator"]',
    ),
    "gradients are left": Mutation(
        "gradients are left",
        "mindspeed.features.memory.planner_step:_gradients",
        "grads.zero_",
        "(lambda: None)",
    ),
}


def alone(rank, world_size):
    found = {"plain": trained({}), "planned": trained(BUDGET)}
    found["experts"] = trained(EXPERTS), trained({**EXPERTS, **BUDGET})
    mutants = {}
    for name, mutation in MUTANTS.items():
        with mutation.applied():
            mutants[name] = trained(BUDGET, steps=1)[0]
    return found, mutants


def test_one_process():
    ((found, mutants),) = run_ranks(alone, 1, preload="megatron")
    losses, _, unplanned, *_ = found["plain"]
    planned, plan, measured, left, notes, text = found["planned"]
    assert planned == losses
    assert all(mutant != losses[:1] for mutant in mutants.values()), mutants
    # Workspaces that were there before a step are not seen by its meter.
    assert max(plan["unplanned"]) == pytest.approx(unplanned + left, rel=0.01)
    assert measured <= plan["budget"] == int(0.8 * max(plan["unplanned"]))
    assert measured == pytest.approx(plan["peak"], rel=0.01)
    assert notes[-1].startswith("memory of stage 0: budget ")
    assert "more than" not in notes[-1]
    assert "layers.0" in text
    assert "measured in one micro-step" in text
    assert {d["option"]["name"] for d in plan["decisions"]} != {"keep"}
    plain, planned = found["experts"]
    assert planned[0] == plain[0]
    assert planned[2] <= planned[1]["budget"]
