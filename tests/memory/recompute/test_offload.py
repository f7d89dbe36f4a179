"""Inputs of recomputed layers on the host, on the simulated device."""

import gc

import pytest

from ms_memory import Session, device
from ms_memory.recompute import modules
from support.gpt import Shape, gpt, tokens
from support.gradients import PLAIN, all_equal, run

SHAPE = Shape(layers=4)
INPUT = 4 * 2 * 5 * SHAPE.width


@pytest.mark.parametrize("schedule", ["early", "late", 1, 2])
def test_offload_inputs(schedule):
    expected = run(gpt(SHAPE), SHAPE)
    model = gpt(SHAPE)
    with Session(model, device=device.sim(schedule=schedule)) as session:
        modules(session, "layers.?", offload_inputs=True, min_bytes=0)
        assert all_equal(run(model, SHAPE), expected)
        out = model(tokens(SHAPE))
        assert session.host.ledger.nbytes == (SHAPE.layers - 1) * INPUT
        out.sum().backward()
        del out
        gc.collect()
        assert session.host.ledger.nbytes == 0


def test_small_inputs_stay():
    model = gpt(PLAIN)
    with Session(model, device=device.sim()) as session:
        modules(session, "layers.?", offload_inputs=True)
        out = model(tokens(PLAIN))
        assert session.host.ledger.total == 0
        out.sum().backward()


def test_on_the_processor_it_is_refused():
    with Session(gpt(PLAIN)) as session, pytest.raises(RuntimeError, match="frees nothing"):
        modules(session, "layers.?", offload_inputs=True)
