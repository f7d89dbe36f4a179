"""Every communication operator alone against its formula, at 1, 2 and 4 ranks."""

import contextlib
import importlib
import json
import warnings
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional

from ms_profile import tap
from ms_profile.comm import CommMeter, Transfer, register
from ms_profile.comm.transfers import READERS
from support.fake import fake_world, on_each_rank
from support.mutation import Mutation, assert_caught
from support.ranks import run_ranks

M = 6  # elements of a rank's part
ODD = 7  # elements that no number of ranks but one divides
GATHER_MANY = dist.distributed_c10d._coalescing_manager


def chunk(elements, rank, size):
    """Elements of a rank's chunk when the first ones get one more."""
    return elements // size + (rank < elements % size)


def spread(count, me, size):
    return {peer: count for peer in range(size) if peer != me}


def reduced(elements, me, size):
    """Chunks to their owners, then the own reduced chunk to all."""
    own = chunk(elements, me, size)
    return {p: chunk(elements, p, size) + own for p in range(size) if p != me}


class Ranks:
    """What the cases need to know: own rank, number of ranks, element type, tensors."""

    def __init__(self, me, size, dtype):
        self.me, self.size, self.dtype = me, size, dtype
        self.next, self.last = (me + 1) % size, (me - 1) % size
        self.world = dist.group.WORLD

    def part(self, elements=M):
        return torch.ones(elements, dtype=self.dtype)

    def parts(self, elements=M):
        return [self.part(elements) for _ in range(self.size)]

    def full(self, elements=M):
        return self.part(elements * self.size)


def exchange(r):
    """Rank i sends i + 1 + j rows of three to rank j."""
    sends = [r.me + 1 + peer for peer in range(r.size)]
    takes = [peer + 1 + r.me for peer in range(r.size)]
    given = torch.ones(sum(sends), 3, dtype=r.dtype)
    taken = torch.zeros(sum(takes), 3, dtype=r.dtype)
    dist.all_to_all_single(taken, given, takes, sends)


def exchange_lists(r):
    given = [r.part(3 * (r.me + 1 + peer)) for peer in range(r.size)]
    taken = [r.part(3 * (peer + 1 + r.me)) for peer in range(r.size)]
    # gloo of older torch has no list form; it was dispatched all the same.
    with contextlib.suppress(RuntimeError):
        dist.all_to_all(taken, given)


def exchanged(r):
    return {peer: 3 * (r.me + 1 + peer) for peer in range(r.size) if peer != r.me}


def rows_exchanged(r):
    return 3 * sum(r.me + 1 + peer for peer in range(r.size))


def coalesced(r, operation, *tensors):
    with GATHER_MANY() as manager:
        for arguments in tensors:
            operation(*arguments)
    del manager


def around(r):
    """Everyone sends to the next rank, in a batch."""
    operations = [
        dist.P2POp(dist.isend, r.part(), r.next),
        dist.P2POp(dist.irecv, r.part(), r.last),
    ]
    for work in dist.batch_isend_irecv(operations):
        work.wait()


def any_source(r):
    if r.me == 0:
        for _ in range(r.size - 1):
            dist.irecv(r.part()).wait()
    else:
        dist.send(r.part(), 0)


# name -> (what is run, [(operation, elements of the full buffer, elements sent by rank)])
CASES = {
    "all_reduce": (
        lambda r: dist.all_reduce(r.part(ODD)),
        lambda r: [("all_reduce", ODD, reduced(ODD, r.me, r.size))],
    ),
    "async all_reduce": (
        lambda r: dist.all_reduce(r.part(), async_op=True).wait(),
        lambda r: [("all_reduce", M, reduced(M, r.me, r.size))],
    ),
    "coalesced all_reduce": (
        lambda r: coalesced(r, dist.all_reduce, [r.part(ODD)], [r.part()]),
        lambda r: [
            (
                "all_reduce",
                ODD + M,
                {p: n + reduced(M, r.me, r.size)[p] for p, n in reduced(ODD, r.me, r.size).items()},
            )
        ],
    ),
    "broadcast": (
        lambda r: dist.broadcast(r.part(), r.size - 1),
        lambda r: [("broadcast", M, spread(M, r.me, r.size) if r.me == r.size - 1 else {})],
    ),
    "reduce": (
        lambda r: dist.reduce(r.part(), 0),
        lambda r: [("reduce", M, {0: M} if r.me else {})],
    ),
    "all_gather": (
        lambda r: dist.all_gather(r.parts(), r.part()),
        lambda r: [("all_gather", M * r.size, spread(M, r.me, r.size))],
    ),
    "all_gather_into_tensor": (
        lambda r: dist.all_gather_into_tensor(r.full(), r.part()),
        lambda r: [("all_gather", M * r.size, spread(M, r.me, r.size))],
    ),
    "coalesced all_gather_into_tensor": (
        lambda r: coalesced(
            r, dist.all_gather_into_tensor, [r.full(), r.part()], [r.full(ODD), r.part(ODD)]
        ),
        lambda r: [("all_gather", (M + ODD) * r.size, spread(M + ODD, r.me, r.size))],
    ),
    "all_gather_coalesced": (
        lambda r: dist.all_gather_coalesced(
            [[r.part(), r.part(ODD)] for _ in range(r.size)], [r.part(), r.part(ODD)]
        ),
        lambda r: [("all_gather", (M + ODD) * r.size, spread(M + ODD, r.me, r.size))],
    ),
    "reduce_scatter": (
        lambda r: dist.reduce_scatter(r.part(), r.parts()),
        lambda r: [("reduce_scatter", M * r.size, spread(M, r.me, r.size))],
    ),
    "reduce_scatter_tensor": (
        lambda r: dist.reduce_scatter_tensor(r.part(), r.full()),
        lambda r: [("reduce_scatter", M * r.size, spread(M, r.me, r.size))],
    ),
    "coalesced reduce_scatter_tensor": (
        lambda r: coalesced(
            r, dist.reduce_scatter_tensor, [r.part(), r.full()], [r.part(ODD), r.full(ODD)]
        ),
        lambda r: [("reduce_scatter", (M + ODD) * r.size, spread(M + ODD, r.me, r.size))],
    ),
    "gather": (
        lambda r: dist.gather(r.part(), r.parts() if r.me == 0 else None, dst=0),
        lambda r: [("gather", M * r.size, {0: M} if r.me else {})],
    ),
    "scatter": (
        lambda r: dist.scatter(r.part(), r.parts() if r.me == 0 else None, src=0),
        lambda r: [("scatter", M * r.size, {} if r.me else spread(M, r.me, r.size))],
    ),
    "all_to_all": (
        exchange_lists,
        lambda r: [("all_to_all", rows_exchanged(r), exchanged(r))],
    ),
    "all_to_all_single": (
        lambda r: dist.all_to_all_single(r.full(), r.full()),
        lambda r: [("all_to_all", M * r.size, spread(M, r.me, r.size))],
    ),
    "all_to_all_single with splits": (
        exchange,
        lambda r: [("all_to_all", rows_exchanged(r), exchanged(r))],
    ),
    "batch of send and receive": (
        lambda r: around(r) if r.size > 1 else None,
        lambda r: [("send", M, {r.next: M}), ("recv", M, {})] if r.size > 1 else [],
    ),
    "send to any": (
        any_source,
        lambda r: [("send", M, {0: M})] if r.me else [("recv", M, {})] * (r.size - 1),
    ),
    "functional all_reduce": (
        lambda r: functional.all_reduce(r.part(ODD), "sum", r.world) + 1,
        lambda r: [("all_reduce", ODD, reduced(ODD, r.me, r.size))],
    ),
    "functional coalesced all_gather": (
        lambda r: [
            x + 1
            for x in functional.all_gather_into_tensor_coalesced([r.part(), r.part(ODD)], r.world)
        ],
        lambda r: [("all_gather", (M + ODD) * r.size, spread(M + ODD, r.me, r.size))],
    ),
    "functional reduce_scatter": (
        lambda r: functional.reduce_scatter_tensor(r.full(), "sum", 0, r.world) + 1,
        lambda r: [("reduce_scatter", M * r.size, spread(M, r.me, r.size))],
    ),
    "functional broadcast": (
        lambda r: functional.broadcast(r.part(), 0, r.world) + 1,
        lambda r: [("broadcast", M, {} if r.me else spread(M, r.me, r.size))],
    ),
}


def transfers_of(calls):
    return [(call.op, call.bytes, dict(call.to)) for call in calls]


def run_cases(rank, world_size):
    warnings.simplefilter("ignore")
    for dtype in (torch.float32, torch.bfloat16):
        r = Ranks(rank, world_size, dtype)
        width = torch.empty((), dtype=dtype).element_size()
        for name, (run, formula) in CASES.items():
            with CommMeter() as meter:
                run(r)
            wanted = [
                (op, width * full, {peer: width * n for peer, n in sent.items() if n})
                for op, full, sent in formula(r)
            ]
            assert transfers_of(meter.calls) == wanted, f"{name} {dtype}"
            for index, call in enumerate(meter.calls):
                assert call.index == index
                assert call.wire_bytes == sum(call.to.values()), name
                assert (call.group, call.ranks) == ("default_pg", tuple(range(world_size)))
                assert call.dtype == str(dtype).removeprefix("torch.")
                assert call.phase == "forward"


def test_every_operator_moves_what_the_textbook_says():
    run_ranks(run_cases, 4)


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_every_rank_of_a_fake_world_agrees(size):
    on_each_rank(partial(run_cases, world_size=size), size)


DOUBLED = Mutation(
    "a chunk is sent twice",
    "ms_profile.comm.transfers:to_others",
    "count for rank",
    "2 * count for rank",
)
OWN_TOO = Mutation(
    "the own chunk counts as sent",
    "ms_profile.comm.transfers:to_owners",
    "if rank != me",
    "if True",
)


@pytest.mark.parametrize("mutation", [DOUBLED, OWN_TOO], ids=lambda m: m.name)
def test_a_wrong_count_is_caught(mutation):
    assert_caught(mutation, lambda: on_each_rank(partial(run_cases, world_size=2), 2))


def whole_programs(rank, world_size):
    """Groups, phases, autograd, DDP, objects, nesting, the matrix."""
    warnings.simplefilter("ignore")
    found = {}
    pairs = [dist.new_group(ranks, group_desc="PAIR") for ranks in ([0, 2], [1, 3])]
    pair = pairs[rank % 2]
    plain = dist.new_group([3, 2, 1, 0])

    with CommMeter() as outer, CommMeter() as inner:
        dist.all_reduce(torch.ones(4), group=pair)
        with tap.unmetered():
            dist.all_reduce(torch.ones(4), group=pair)
        dist.barrier(group=plain)
    dist.all_reduce(torch.ones(4), group=pair)
    assert inner.calls == outer.calls
    found["groups"] = [(c.op, c.group, c.ranks, c.wire_bytes, dict(c.to)) for c in inner.calls]
    with pytest.raises(RuntimeError, match="is on already"), inner, inner:
        pass

    with CommMeter() as meter:
        x = torch.ones(8, requires_grad=True)
        functional.all_to_all_single_autograd(
            x, [2] * 4, [2] * 4, dist.group.WORLD
        ).sum().backward()
        with torch.no_grad():
            dist.all_reduce(torch.ones(2))
    found["autograd"] = [(c.op, c.bytes, c.phase) for c in meter.calls]

    with CommMeter() as meter:
        dist.all_gather_object([None] * world_size, "payload")
    found["objects"] = [(c.op, c.dtype) for c in meter.calls]

    linear = torch.nn.Linear(4, 4)
    model = torch.nn.parallel.DistributedDataParallel(linear)
    with CommMeter() as meter:
        model(torch.ones(2, 4)).sum().backward()
    found["ddp"] = [(c.op, c.bytes, c.phase) for c in meter.calls]
    assert linear.weight.grad is not None

    with CommMeter() as meter:
        if rank == 0:
            dist.send(torch.ones(3), 3)
        if rank == 3:
            dist.recv(torch.ones(3), 0)
        dist.broadcast(torch.ones(5), 1)
    found["matrix"] = meter.gather()
    assert meter.matrix()[rank] == found["matrix"][rank]
    assert len(meter.calls) == 1 + (rank in (0, 3))
    found["json"] = json.dumps(meter.as_dict())
    return found


def test_groups_phases_and_whole_programs():
    ranks = run_ranks(whole_programs, 4)
    for rank, found in enumerate(ranks):
        peer = (rank + 2) % 4
        pair = tuple(sorted((rank, peer)))
        assert found["groups"][0] == ("all_reduce", "PAIR", pair, 16, {peer: 16})
        # A group without a description keeps the name that torch numbers it with.
        op, name, members, wire, _ = found["groups"][1]
        assert (op, members, wire, name.isdigit()) == ("barrier", (0, 1, 2, 3), 0, True)
        assert len(found["groups"]) == 2
        # The functional form and the autograd form inside it are one call each way.
        assert found["autograd"] == [
            ("all_to_all", 32, "forward"),
            ("all_to_all", 32, "backward"),
            ("all_reduce", 8, "other"),
        ]
        assert [op for op, _ in found["objects"]] == ["all_gather", "all_gather"]
        assert found["ddp"] == [("all_reduce", 4 * (16 + 4), "backward")]
        assert found["matrix"] == [[0, 0, 0, 12], [20, 0, 20, 20], [0] * 4, [0] * 4]
        data = json.loads(found["json"])
        assert (data["kind"], data["version"], data["rank"]) == ("comm", 1, rank)
        assert data["world_size"] == 4
        assert " ".join(data["calls"][0]) == (
            "index op group ranks bytes wire_bytes to dtype phase module"
        )


class Reduced(torch.nn.Module):
    def forward(self, x):
        dist.all_reduce(x)
        return x


def on_one_rank(rank, world_size):
    meter = CommMeter()
    model = torch.nn.Sequential(torch.nn.Identity(), Reduced())
    for _ in range(2):
        with meter:
            model(torch.ones(3, 4))
            dist.all_reduce(torch.ones(2, dtype=torch.float16))
    rows = meter.table()
    sums = meter.total(of="bytes"), meter.total(op="all_reduce", of="calls"), meter.total()
    assert sums == (48 + 4, 2, 0)
    assert meter.total(group="nobody", of="bytes") == meter.total(phase="backward") == 0
    return rows, [call.module for call in meter.calls]


def test_table_totals_and_modules():
    rows, modules = run_ranks(on_one_rank, 1)[0]
    assert rows == [
        {
            "group": "default_pg",
            "op": "all_reduce",
            "phase": "forward",
            "calls": 2,
            "bytes": 52,
            "wire_bytes": 0,
        }
    ]
    assert modules == ["Sequential.1", ""]


class Mean(torch.autograd.Function):
    """Applies itself on the way back, as Megatron's all-to-all does."""

    @staticmethod
    def forward(ctx, x):
        y = x.clone()
        dist.all_reduce(y)
        return y

    @staticmethod
    def backward(ctx, grad):
        return Mean.apply(grad)


class Block(torch.nn.Linear):
    def forward(self, x):
        return Mean.apply(super().forward(x)).sin()


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_recomputed_communication_is_told_from_backward(reentrant):
    from torch.utils.checkpoint import checkpoint

    model = Block(4, 4)
    x = torch.ones(2, 4, requires_grad=True)
    with fake_world(2), CommMeter() as meter:
        out = model(x) if reentrant is None else checkpoint(model, x, use_reentrant=reentrant)
        out.sum().backward()
    again = [] if reentrant is None else [("recompute", "Block")]
    found = [(call.phase, call.module) for call in meter.calls]
    assert found == [("forward", "Block"), *again, ("backward", "Block")]


def unknown_operator(rank, world_size):
    library = torch.library.Library("comm_test", "FRAGMENT")
    library.define("fused(Tensor x, str group_name) -> Tensor")
    library.impl("fused", lambda x, group_name: x * 2, "CPU")
    fused = torch.ops.comm_test.fused
    name = dist.group.WORLD.group_name
    with pytest.raises(LookupError, match="comm_test::fused takes a process group"), CommMeter():
        fused(torch.ones(4), name)
    assert torch.equal(fused(torch.ones(4), name), torch.full((4,), 2.0))

    def reader(args, me, size):
        yield Transfer("all_reduce", args["x"].nbytes, {}, "float32")

    register("comm_test::fused", reader)
    with CommMeter() as meter:
        fused(torch.ones(4), group_name=name)
    assert [(call.op, call.bytes) for call in meter.calls] == [("all_reduce", 16)]
    with pytest.raises(ValueError, match="has a reader already"):
        register("comm_test::fused", reader)


def test_an_unknown_operator_with_a_group_is_an_error():
    run_ranks(unknown_operator, 1)


def test_dtensor():
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

    with fake_world(4):
        mesh = init_device_mesh("cpu", (4,))
        sharded = distribute_tensor(torch.ones(8, 4), mesh, [Shard(0)])
        with CommMeter() as meter:
            (sharded.redistribute(mesh, [Replicate()]) + 1).to_local()
    found = [(c.op, c.bytes, c.wire_bytes, c.phase) for c in meter.calls]
    assert found == [("all_gather", 4 * 8 * 4, 4 * 3 * 2 * 4, "forward")]


def test_every_operator_of_this_torch_that_takes_a_group_has_a_reader():
    importlib.import_module("torch.distributed.tensor")  # defines its operators

    spaces = ("c10d::", "_c10d_functional::", "_c10d_functional_autograd::", "_dtensor::")
    taking = {
        schema.name
        for schema in torch._C._jit_get_all_schemas()
        if schema.name.startswith(spaces)
        and any(
            argument.name == "group_name" or str(argument.type).endswith(".ProcessGroup")
            for argument in schema.arguments
        )
    }
    assert len(taking) > 30
    assert taking <= set(READERS)


def test_nothing_is_counted_of_a_program_without_communication():
    with CommMeter() as meter:
        torch.ones(3) * 2
    assert meter.calls == ()
    assert meter.matrix() == [[0]]
    assert meter.gather() == [[0]]
    assert meter.as_dict()["calls"] == []
