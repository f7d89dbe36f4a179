"""Every communication operator alone against its formula, at 1, 2 and 4 ranks."""

import contextlib
import importlib
import warnings
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional

from ms_profile.comm import CommMeter
from ms_profile.comm.transfers import READERS
from support.fake import on_each_rank
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
