"""Events of an execution: the checks pass on what runs, and catch what is broken on purpose."""

from dataclasses import replace

import pytest

from ms_parallel.context import AttnMask, SeqLayout, Simulation
from ms_parallel.context.trace import (
    Event,
    TraceError,
    check_order,
    check_overlap,
    check_progress,
    check_races,
    check_trace,
)
from ms_parallel.context.world import SimulationError
from support.context import Case, check_case, make_plan
from support.mutation import Mutation, assert_caught

PACKAGE = "ms_parallel.context"
RING = make_plan(SeqLayout.zigzag(48, 4), AttnMask.causal())
# Inner steps receive into buffers while the outer message is under way.
RINGS = make_plan(SeqLayout.zigzag(96, 8), AttnMask.causal(), window=4)
ULYSSES = make_plan(SeqLayout.zigzag(24, 4), AttnMask.causal(), heads=(4, 1), algorithm="ulysses")


def run(plan=RING):
    check_case(Case(plan))


def traced(plan):
    """Run a plan and check its events alone."""
    record = Simulation()
    Case(plan).simulated(record)
    check_trace(record.forward_logs)
    check_trace(record.backward_logs)


EARLY = Mutation(
    "a buffer is used again while an outer message reads it",
    f"{PACKAGE}.store:Pool.release",
    "if slot.sends:",
    "if not slot.sends:",
)


def test_the_race_of_the_two_level_ring_is_caught():
    traced(RINGS)
    with EARLY.applied(), pytest.raises(TraceError, match="during the send of transfer"):
        traced(RINGS)


VALUES = [
    Mutation("no old output in a merge", f"{PACKAGE}.kernels:merge", "out.flatten(1, 2), lse",
             "torch.zeros_like(out).flatten(1, 2), lse"),
    Mutation("a merge without weights", f"{PACKAGE}.forward:Forward._merge",
             "old_lse.copy_(new_lse)", "old_lse.copy_(lse)"),
    Mutation("no partial gradients from before", f"{PACKAGE}.backward:Backward.arrived",
             "self._add(entry.part, rows, piece.rows)", "pass"),
    Mutation("partial gradients added twice", f"{PACKAGE}.backward:Backward._add",
             "+= some", "+= 2 * some"),
    Mutation("a wrong slice of keys", f"{PACKAGE}.executor:Run._rows",
             "start, p.start) - p.start : min(stop, p.stop) - p.start",
             "start, p.start) - p.start : min(stop, p.stop) - p.start].roll(1, 0)[:"),
    Mutation("messages to the other neighbour", f"{PACKAGE}.executor:Run._message",
             "transfer.dst if sending", "transfer.src if not sending"),
    Mutation("no scale", f"{PACKAGE}.kernels:_options", '"scale": how.scale', '"scale": 1.0'),
]  # fmt: skip


@pytest.mark.parametrize("mutation", VALUES, ids=lambda m: m.name)
def test_wrong_arithmetic_is_caught(mutation):
    assert_caught(mutation, run, (AssertionError, RuntimeError, ValueError, SimulationError))


def test_a_sum_of_copies_that_is_missing_is_caught():
    once = Mutation("only the last copy", f"{PACKAGE}.pack:unpack_rows",
                    "into.add_(piece) if shared[i]", "into.copy_(piece) if shared[i]")  # fmt: skip
    assert_caught(once, lambda: run(ULYSSES))


def test_messages_that_start_late_are_caught():
    late = Mutation("posted after the computation", f"{PACKAGE}.executor:Run.walk",
                    "yield from self._receive(step.wait_after)",
                    "self.note(Event('receive', t, 0, 0)); yield from "
                    "self._receive(step.wait_after)")  # fmt: skip
    assert_caught(late, lambda: traced(RING), TraceError)


def test_bytes_that_are_not_planned_are_caught():
    twice = Mutation("a message twice as long", f"{PACKAGE}.world:SimTransport.post",
                     "message.tensor.nbytes", "2 * message.tensor.nbytes")  # fmt: skip
    assert_caught(twice, run)


def message(kind, transfer, peer, slot=1, step=0, lane=""):
    used = {"reads": (slot,)} if kind == "send" else {"writes": (slot,)}
    return Event(kind, step, transfer, peer, lane=lane, **used)


def test_races():
    send, done = message("send", 3, 1), Event("done", 1, 3)
    check_races([send, done, Event("free", 1, reads=(1,))])
    for event in (Event("free", 1, reads=(1,)), Event("write", 1, writes=(1,))):
        with pytest.raises(TraceError, match="buffer 1 during the send of transfer 3"):
            check_races([send, event, done])
    receive = message("receive", 3, 1)
    check_races([send, Event("compute", 0, reads=(1,)), done])
    with pytest.raises(TraceError, match="compute reads buffer 1 during the receive"):
        check_races([receive, Event("compute", 0, reads=(1,)), done])
    with pytest.raises(TraceError, match="receive writes buffer 1 during the send"):
        check_races([send, message("receive", 4, 2)])
    with pytest.raises(TraceError, match="never awaited"):
        check_races([send])


def test_overlap():
    post, compute, done = message("receive", 0, 1), Event("compute", 0), Event("done", 1, 0)
    check_overlap([post, compute, done])
    with pytest.raises(TraceError, match="starts after"):
        check_overlap([compute, post, done])
    with pytest.raises(TraceError, match="is awaited before"):
        check_overlap([post, done, compute])


def test_order():
    logs = [[message("send", 0, 1), message("send", 1, 1)],
            [message("receive", 1, 0), message("receive", 0, 0)]]  # fmt: skip
    with pytest.raises(TraceError, match="ranks 0 -> 1: one sends transfer 0"):
        check_order(logs)


def ring(size, lanes=("a", "b")):
    """Everyone sends to the next; `lanes` of sending and of receiving."""
    return [
        [message("send", r, (r + 1) % size, lane=lanes[0]),
         message("receive", (r - 1) % size, (r - 1) % size, lane=lanes[1])]
        for r in range(size)
    ]  # fmt: skip


def test_progress():
    for p2p in ("batched", "dual_group"):
        check_progress(ring(3, ("a", "a")), p2p)
    with pytest.raises(TraceError, match="deadlock of ranks"):
        check_progress(ring(3))  # Everyone sends first, on one communicator in order.


@pytest.mark.parametrize("size", [2, 3, 4, 5, 8])
def test_two_groups_need_no_order_of_sending_and_receiving(size):
    """Also in an odd ring, where the last and the first have the same parity."""
    check_progress(ring(size), "dual_group")
    check_progress(ring(size, ("a", "a")), "dual_group")


def test_a_deadlock_is_reported_by_the_simulation():
    plan = make_plan(SeqLayout.zigzag(8, 2), AttnMask.causal())
    (first, *later), other = plan.forward.steps[1], plan.forward.steps[0]
    silent = replace(first, post=tuple(i for i in first.post if plan.forward.transfers[i].src == 0))
    program = replace(plan.forward, steps=(other, (silent, *later)))
    with pytest.raises(SimulationError, match="deadlock: rank 0 waits for transfer"):
        Case(replace(plan, forward=program)).simulated()


def test_memory_of_the_ring_does_not_grow_with_it():
    """Slots are used again: as many of them at 16 ranks as at 4."""
    counts = []
    for size in (4, 16):
        plan = make_plan(SeqLayout.zigzag(8 * size, size), AttnMask.causal())
        record = Simulation()
        Case(plan).simulated(record)
        slots = [
            {n for e in log for n in (*e.reads, *e.writes)}
            for log in (*record.forward_logs, *record.backward_logs)
        ]
        counts.append(max(map(len, slots)))
    assert counts[0] == counts[1] <= 6
