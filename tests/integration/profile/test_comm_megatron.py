"""Communication of Megatron's own parallel forms at level 0, to the byte.

A step of a tiny GPT is metered on every rank and compared with the textbook, per group, operation
and phase. The letters of the formulas: S sequence, H hidden, V padded vocabulary, L layers of
attention (4 H^2 weights) and MLP (8 H^2); b bytes of an activation; n micro-batches of a sequence.
Gradients and norms are fp32. Outside of autograd passes, with gradients on, the meter says
`forward`: pipeline messages and gradient reductions stand there.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest

from support.mutation import Mutation
from support.ranks import RankError, run_ranks

S, H, V, L, SAMPLES = 16, 32, 64, 2, 2
EXPERTS, TOP_K, FFN = 4, 2, 24
TP = "TENSOR_MODEL_PARALLEL_GROUP"
DP = "DATA_PARALLEL_GROUP_WITH_CP"
PP = "PIPELINE_MODEL_PARALLEL_GROUP"
EP = "EXPERT_MODEL_PARALLEL_GROUP"
EXPERTS_ALL = "EXPERT_TENSOR_AND_MODEL_PARALLEL_GROUP"
NORM = "MODEL_PARALLEL_GROUP"
SHARD_NORM = "INTRA_DISTRIBUTED_OPTIMIZER_INSTANCE_GROUP"

GPT = {
    "num_layers": L,
    "hidden_size": H,
    "num_attention_heads": 4,
    "seq_length": S,
    "vocab_size": 61,
    "make_vocab_size_divisible_by": V,
    "micro_batch_size": 1,
    "global_batch_size": SAMPLES,
    "train_iters": 2,
}
MOE = GPT | {
    "num_experts": EXPERTS,
    "moe_ffn_hidden_size": FFN,
    "moe_router_topk": TOP_K,
    "expert_model_parallel_size": 2,
    "add_bias_linear": False,
}


def run_step(rank, world_size, flat, dtypes):
    """Rows of a metered step in every dtype, routers' choices, the order in a linear's backward."""
    import torch.distributed as dist

    from mindspeed.train import TrainConfig, Trainer
    from ms_profile import CommMeter, EventTrace

    found = {}
    for dtype in dtypes:
        with Trainer(TrainConfig.of(**flat, bf16=dtype == "bf16")) as trainer:
            chosen = watch_routers(trainer.chunks[0])
            with CommMeter() as meter, EventTrace(forwards=False) as trace:
                trainer.train_step()
            everyone = [None] * world_size
            dist.all_gather_object(everyone, chosen)
        # The trainer's own report goes through the default group.
        rows = [row for row in meter.table() if row["group"] != "default_pg"]
        found[dtype] = rows, everyone, backward_of(trace, "layers.0.mlp.linear_fc1")
    return found


def backward_of(trace, module):
    """What begins in the backward of a module, in order: products and communication."""
    return [
        f"{event.kind} {event.name}"
        for event in trace.events
        if event.phase == "backward" and event.module.endswith(module)
        if event.kind in ("launch", "wait") or event.name == "aten.mm"
    ]


def watch_routers(model):
    """Rows that each router sends to each expert, one list per call."""
    chosen = []
    for module in model.modules():
        if type(module).__name__ == "TopKRouter":
            module.register_forward_hook(
                lambda module, args, out: chosen.append(out[1].sum(dim=0).tolist())
            )
    return chosen


@dataclass(frozen=True)
class Step:
    """What the formulas need: sizes of the groups, micro-batches, this rank's place."""

    b: int  # bytes of an activation
    n: int  # micro-batches
    t: int = 1  # tensor parallel ranks
    d: int = 1  # data parallel ranks
    rank: int = 0
    routed: tuple = ()

    @property
    def activation(self):
        return S * H * self.b


def sent(op, count, size):
    """Bytes sent to others of a buffer of `count` bytes, divisible by the group's size."""
    share = count // size * (size - 1)
    return {"all_reduce": 2 * share, "recv": 0, "send": count}.get(op, share)


def row(group, op, phase, calls, count, size):
    return (group, op, phase), (calls, calls * count, calls * sent(op, count, size))


def loss(step):
    """Cross entropy over split logits: maximum, target's logit, sum of exponentials, in fp32."""
    return row(TP, "all_reduce", "forward", 3 * step.n, S * 4, step.t)


def parameters(t, norms=1):
    """Parameters of a rank: weights split by t; norms and biases after row splits are whole."""
    split = 12 * H * H + 3 * H + 4 * H  # weights, biases of qkv and of the MLP's first linear
    whole = 2 * H + 4 * H  # biases of projection and of the second linear, two norms
    return V * H // t + L * (split // t + whole) + norms * 2 * H


def tensor_parallel(step):
    """All-reduce after embedding, attention, MLP; of the input's gradient before each, and logits'.

    Forward and backward alternate: the two conjugate operators of a split pair of linears.
    """
    yield row(TP, "all_reduce", "forward", step.n * (1 + 2 * L), step.activation, step.t)
    yield loss(step)
    yield row(TP, "all_reduce", "backward", step.n * (2 * L + 1), step.activation, step.t)
    yield row(DP, "all_reduce", "forward", 1, 4 * parameters(step.t), step.d)
    yield row(NORM, "all_reduce", "other", 1, 4, step.t)


def sequence_parallel(step):
    """Each all-reduce becomes reduce-scatter and all-gather, the same bytes on the wire.

    A column-split linear keeps its shard only and gathers it again for the weight's gradient: that
    is one all-gather more in backward for each of the 2 L + 1 of them.
    """
    a, t = step.activation, step.t
    yield row(TP, "all_gather", "forward", step.n * (2 * L + 1), a, t)
    yield row(TP, "reduce_scatter", "forward", step.n * (1 + 2 * L), a, t)
    yield loss(step)
    yield row(TP, "all_gather", "backward", step.n * (1 + 2 * L + 2 * L + 1), a, t)
    yield row(TP, "reduce_scatter", "backward", step.n * (2 * L + 1), a, t)
    # Norms (4 H a layer, 2 H at the end) and biases of row splits (2 H) saw parts of the sequence.
    yield row(TP, "all_reduce", "forward", 1, 4 * (6 * H * L + 2 * H), t)


def sequence_parallel_alone(step):
    yield from sequence_parallel(step)
    yield row(DP, "all_reduce", "forward", 1, 4 * parameters(step.t), step.d)
    yield row(NORM, "all_reduce", "other", 1, 4, step.t)


def data_parallel(step):
    """One all-reduce of all gradients; no other group has a second rank."""
    yield loss(step)
    yield row(DP, "all_reduce", "forward", 1, 4 * parameters(1), step.d)
    yield row(NORM, "all_reduce", "other", 1, 4, 1)


def padded(t):
    """Parameters in the optimizer's buffer: each begins at a multiple of 64, all end at one of 128.

    Only vectors of odd multiples of 32 leave gaps.
    """
    vectors = [*[H] * 6, 3 * H // t, 4 * H // t] * L + [H] * 2
    gaps = sum(-size % 64 for size in vectors)
    return -(-(parameters(t) + gaps) // 128) * 128


def distributed_optimizer(step):
    """Gradients are scattered (fp32), updated parameters gathered (in their own type)."""
    yield row(DP, "reduce_scatter", "forward", 1, 4 * padded(step.t), step.d)
    yield row(DP, "all_gather", "other", 1, step.b * padded(step.t), step.d)
    size = step.t * step.d
    # One number has one owner: the others send it theirs, and it sends them the sum.
    owner = step.rank == 0 and size > 1
    yield (SHARD_NORM, "all_reduce", "other"), (1, 4, 4 * (size - 1) if owner else 4)


def data_parallel_sharded(step):
    yield loss(step)
    yield from distributed_optimizer(step)


def tensor_and_data_parallel(step):
    yield from sequence_parallel(step)
    yield from distributed_optimizer(step)


def pipeline_parallel(step):
    """An activation there and its gradient back per micro-batch; both ends hold the embedding."""
    a, first = step.activation, step.rank == 0
    yield row(PP, "send", "forward", step.n, a, 2)
    yield row(PP, "recv", "forward", step.n, a, 2)
    if not first:
        yield loss(step)
    layer = (parameters(1, norms=0) - V * H) // L
    held = V * H + layer * L // 2 + (0 if first else 2 * H)
    yield row(DP, "all_reduce", "forward", 1, 4 * held, 1)
    yield row("EMBEDDING_GROUP", "all_reduce", "forward", 1, 4 * V * H, 2)
    yield row(NORM, "all_reduce", "other", 1, 4, 2)


def experts(step):
    """What both dispatchers share: gradients of what is not an expert, norms of both kinds."""
    dense = V * H + L * (4 * H * H + 4 * H + EXPERTS * H) + 2 * H
    yield loss(step)
    yield row(DP, "all_reduce", "forward", 1, 4 * dense, step.d)
    local = L * EXPERTS // 2 * 2 * H * FFN
    yield row("EXPERT_DATA_PARALLEL_GROUP", "all_reduce", "forward", 1, 4 * local, 1)
    yield row(NORM, "all_reduce", "other", 1, 4, 1)
    yield row("EXPERT_TENSOR_MODEL_PIPELINE_PARALLEL_GROUP", "all_reduce", "other", 1, 4, 2)


def gathered_experts(step):
    """Every rank gets all tokens, their routing map (a byte an expert) and their probabilities.

    Backward mirrors it: gradients of the sum are gathered, those of what was gathered scattered.
    """
    layers, ranks = step.n * L, 2
    tokens, probabilities = ranks * step.activation, ranks * S * EXPERTS * step.b
    yield row(EXPERTS_ALL, "all_gather", "forward", layers, ranks * S * EXPERTS, ranks)
    yield row(EXPERTS_ALL, "all_gather", "forward", layers, probabilities, ranks)
    yield row(EXPERTS_ALL, "all_gather", "forward", layers, tokens, ranks)
    yield row(EXPERTS_ALL, "reduce_scatter", "forward", layers, tokens, ranks)
    yield row(EXPERTS_ALL, "all_gather", "backward", layers, tokens, ranks)
    yield row(EXPERTS_ALL, "reduce_scatter", "backward", layers, tokens, ranks)
    yield row(EXPERTS_ALL, "reduce_scatter", "backward", layers, probabilities, ranks)
    yield from experts(step)


def exchanged_experts(step):
    """Rows go to the rank of their expert and come back; so do their gradients.

    Rows and probabilities to the experts, results back: what leaves is what the router chose here
    for the other rank's experts, then what it chose there for the experts here.
    """
    layers, local = step.n * L, EXPERTS // 2
    yield row(EXPERTS_ALL, "all_gather", "forward", layers, 2 * EXPERTS * 8, 2)
    mine, other = (slice(rank * local, rank * local + local) for rank in (step.rank, 1 - step.rank))
    chosen = [
        (sum(here), sum(here[other]), sum(here[mine]) + sum(there[mine]), sum(there[mine]))
        for here, there in zip(step.routed[step.rank], step.routed[1 - step.rank], strict=True)
    ]
    assert len(chosen) == layers
    out, out_remote, back, back_remote = (sum(column) for column in zip(*chosen, strict=True))
    assert out == layers * S * TOP_K
    hidden, both = H * step.b, H * step.b + step.b
    for phase, there, here in (
        ("forward", both, hidden),
        ("backward", hidden, both),
    ):
        count = out * there + back * here
        remote = out_remote * there + back_remote * here
        yield (EP, "all_to_all", phase), (3 * layers, count, remote)
    yield from experts(step)


@dataclass(frozen=True)
class Division:
    options: dict
    formula: Callable
    ranks: int = 2
    t: int = 1
    d: int = 1
    dtypes: tuple = ("bf16",)


SPLIT = {"tensor_model_parallel_size": 2}
SEQUENCE = SPLIT | {"sequence_parallel": True}
SHARDED = {"use_distributed_optimizer": True}
BOTH = ("fp32", "bf16")
DIVISIONS = {
    "one": Division(GPT, data_parallel, ranks=1, dtypes=("fp32",)),
    "tp": Division(GPT | SPLIT, tensor_parallel, t=2, dtypes=("fp32",)),
    "tp_sp": Division(GPT | SEQUENCE, sequence_parallel_alone, t=2),
    "dp": Division(GPT, data_parallel, d=2),
    "dp_sharded": Division(GPT | SHARDED, data_parallel_sharded, d=2, dtypes=BOTH),
    "tp_sp_dp_sharded": Division(
        GPT | SEQUENCE | SHARDED, tensor_and_data_parallel, ranks=4, t=2, d=2
    ),
    "pp": Division(GPT | {"pipeline_model_parallel_size": 2}, pipeline_parallel),
    "ep_allgather": Division(
        MOE | {"moe_token_dispatcher_type": "allgather"}, gathered_experts, d=2, dtypes=("fp32",)
    ),
    "ep_alltoall": Division(
        MOE | {"moe_token_dispatcher_type": "alltoall"}, exchanged_experts, d=2
    ),
}


def textbook(formula, step):
    rows = Counter(), Counter(), Counter()
    for key, numbers in formula(step):
        for total, number in zip(rows, numbers, strict=True):
            total[key] += number
    return {key: tuple(total[key] for total in rows) for key in rows[0]}


def check(division, mutate=()):
    """Compares all ranks with the textbook; returns what they found."""
    arguments = division.options, division.dtypes
    ranks = run_ranks(run_step, division.ranks, *arguments, preload="megatron", mutate=mutate)
    for rank, found in enumerate(ranks):
        for dtype, (rows, routed, _) in found.items():
            width = 2 if dtype == "bf16" else 4
            n = SAMPLES // division.d
            step = Step(width, n, division.t, division.d, rank, tuple(routed))
            counted = {
                (r["group"], r["op"], r["phase"]): (r["calls"], r["bytes"], r["wire_bytes"])
                for r in rows
            }
            assert counted == textbook(division.formula, step), f"rank {rank}, {dtype}"
    return ranks


@pytest.mark.parametrize("name", DIVISIONS)
def test_bytes_equal_the_textbook(name):
    ranks = check(DIVISIONS[name])
    if name == "tp_sp":
        # The input is gathered while its gradient is made, that is scattered while the weight's is.
        hidden = [
            "launch all_gather",
            "compute aten.mm",
            "wait all_gather",
            "launch reduce_scatter",
            "compute aten.mm",
            "wait reduce_scatter",
        ]
        assert all(found["bf16"][2] == SAMPLES * hidden for found in ranks)


MAPPINGS = "megatron.core.tensor_parallel.mappings"
TWICE = Mutation(
    "an all-reduce is doubled",
    f"{MAPPINGS}:_reduce",
    "torch.distributed.all_reduce(input_.contiguous(), group=group)",
    "[torch.distributed.all_reduce(x, group=group) for x in (input_.clone(), input_)]",
)
DROPPED = Mutation(
    "a reduce-scatter is dropped",
    f"{MAPPINGS}:_ReduceScatterToSequenceParallelRegion.forward",
    "return _reduce_scatter_along_first_dim(",
    "return (lambda x, group, *rest: x.chunk(group.size())[group.rank()].clone())(",
)


@pytest.mark.parametrize(("name", "mutation"), [("tp", TWICE), ("tp_sp", DROPPED)])
def test_a_changed_program_is_caught(name, mutation):
    with pytest.raises(AssertionError) as caught:
        check(replace(DIVISIONS[name], dtypes=("fp32",)), mutate=[mutation])
    assert not isinstance(caught.value, RankError), caught.value
