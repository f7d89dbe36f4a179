"""Swapping in Megatron's models: the same numbers at every schedule, bytes by formula, no leaks."""

import pytest

from support.ranks import run_ranks

SWAP = {"swap_attention": True, "swap_min_bytes": 0}
INPUTS = {"swap_layer_input": True, "swap_min_bytes": 0}
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
EXPERTS = {"num_experts": 4, "moe_router_topk": 2, "moe_aux_loss_coeff": 0.1}
FUSED = {"gradient_accumulation_fusion": True, "overlap_grad_reduce": True, "bf16": True}
# Name -> the flags that change nothing, and the run that they are added to.
RUNS = {
    "attention": (SWAP, {}),
    "MLPs recomputed": ({**SWAP, "recompute_num_layers": 3}, {}),
    "the first two": ({**SWAP, "recompute_num_layers": 2, "recompute_method": "block"}, {}),
    "everything": ({**SWAP, "swap_modules": "mlp,self_attention,input_norm", "swap_depth": 3}, {}),
    "experts": ({**SWAP, "swap_modules": "mlp,self_attention", "recompute_num_layers": 1}, EXPERTS),
    "fused gradients": ({**SWAP, "recompute_norm": True}, FUSED),
    "inputs": (INPUTS, FULL),
    "inputs of groups": (INPUTS, {**FULL, "recompute_num_layers": 3, "hidden_dropout": 0.1}),
    "inputs of a block": (INPUTS, {**FULL, "recompute_method": "block"}),
}
# Bytes that one layer saves for one sequence: the statistics of its two norms among them.
NORMS = 2 * 4 * 16
KEPT = 16 * 4 * (3 * 32 + 3 * 32 + 3 * 16) + 4 * 16 * 4 + NORMS
INPUT = 16 * 4 * 32
# Most bytes on the host: micro-batches follow each other here, so that one is in flight.
PEAKS = {
    "attention": 3 * KEPT,
    "MLPs recomputed": 3 * KEPT,
    "the first two": 2 * KEPT,
    "inputs": 3 * INPUT,
    "inputs of groups": INPUT,
    "inputs of a block": INPUT,
}


def one_process(rank, world_size):
    from support.memory_runs import schedules, train

    found, plain = {}, {}
    for name, (flags, rest) in RUNS.items():
        key = str(rest)
        plain[key] = plain.get(key) or train(rest)
        found[name] = [plain[key], *schedules({**rest, **flags}, ["late"])]
    found["attention"] += schedules(SWAP, ["early", 1, 2])
    found["inputs"] += schedules({**FULL, **INPUTS}, ["early"])
    return found


@pytest.fixture(scope="module")
def alone():
    (found,) = run_ranks(one_process, 1, preload="megatron")
    return found


@pytest.mark.parametrize("name", RUNS)
def test_the_same_numbers_at_every_schedule(alone, name):
    plain, *swapped = alone[name]
    assert plain["moved"] == 0
    for each in swapped:
        assert each["numbers"] == plain["numbers"]
        assert each["parameters"] == plain["parameters"]
        assert each["moved"] > 0
        assert each["left"] == 0


@pytest.mark.parametrize(("name", "peak"), PEAKS.items())
def test_bytes_on_the_host(alone, name, peak):
    assert {each["peak"] for each in alone[name][1:]} == {peak}


def details(rank, world_size):
    """What is on the device after forward, what an exception leaves, wrong waits, lost weights."""
    import gc
    import os

    import torch

    from mindspeed.features.memory import weights
    from mindspeed.features.memory.session import open_session, open_sessions
    from mindspeed.features.memory.settings import MemorySettings
    from mindspeed.train.model import unwrap
    from mindspeed.train.trainer import Trainer
    from support.memory_runs import config, schedules, train
    from support.mutation import Mutation

    os.environ["MS_MEMORY_SIM"] = "late"
    found = {}
    tokens = torch.arange(16).view(1, -1)
    with Trainer(config({**SWAP, "recompute_num_layers": 1})) as trainer:
        (session,) = open_sessions()
        (chunk,) = trainer.chunks
        ledger = session.ledger
        loss = chunk(tokens, tokens, None, labels=tokens)
        found["bytes"] = ledger.nbytes, ledger.live_bytes, session.host.ledger.nbytes
        names = dict(unwrap(chunk).named_parameters())
        found["weights"] = sum(p.untyped_storage().nbytes() == 0 for p in names.values())
        loss.sum().backward()
        found["after"] = session.host.ledger.nbytes

        def fail(module, args):
            raise ArithmeticError("as asked")

        handle = unwrap(chunk).decoder.layers[2].mlp.register_forward_pre_hook(fail)
        moved = session.host.ledger.total
        with pytest.raises(ArithmeticError):
            chunk(tokens, tokens, None, labels=tokens)
        handle.remove()
        gc.collect()
        found["exception"] = session.host.ledger.total - moved, session.host.ledger.nbytes
        with torch.no_grad():
            chunk(tokens, tokens, None, labels=tokens)
        found["no_grad"] = session.host.ledger.total - moved
        model = unwrap(chunk)
    found["closed"] = (
        session.closed,
        "forward" in vars(model),
        model.decoder.layers[0].recompute_mlp,
    )

    item = "ms_memory.swap.prefetch:_Item"
    faults = {
        "missing wait": Mutation("missing wait", f"{item}.get", "self._back.wait()", "pass"),
        "early free": Mutation("early free", f"{item}.release", "self._out.wait()", "pass"),
    }
    for name, fault in faults.items():
        with fault.applied():
            found[name] = schedules(SWAP, ["late", "early"])
    refused = []
    for options in (
        {"swap_attention": True},
        {"swap_attention": True, "num_layers": 1, "swap_min_bytes": 4097},
        {**FULL, **INPUTS, "swap_min_bytes": 2049},
    ):
        with pytest.raises(ValueError, match="E-M22") as error:
            train(options)
        refused.append(str(error.value))
    found["small"] = refused
    with pytest.raises(ValueError, match=r"E-M32.* exceed 40960"):
        train({**SWAP, "swap_host_bytes": 40_960})
    assert train({**SWAP, "swap_host_bytes": 40_960, "swap_modules": "input_norm"})["moved"] > 0
    with Trainer(config({})) as trainer:
        (chunk,) = map(unwrap, trainer.chunks)
        chunk.config.cpu_offloading = True
        with pytest.raises(ValueError, match=r"E-M10.*cpu_offloading"):
            open_session(chunk, MemorySettings(swap_parts=("self_attention",)))
    weights._Saved.saved_tensors = property(lambda self: self._ctx.saved_tensors)
    try:
        train({**FUSED, **SWAP}, steps=1)
    except AssertionError as error:
        found["lost"] = str(error)
    return found


@pytest.fixture(scope="module")
def found():
    (got,) = run_ranks(details, 1, preload="megatron")
    return got


def test_live_bytes_after_forward(found):
    every, live, host = found["bytes"]
    assert host == 3 * KEPT
    assert every - live == host
    assert found["weights"] == found["after"] == 0


def test_an_exception_in_forward_releases_the_host(found):
    moved, left = found["exception"]
    assert moved > 0
    assert left == 0
    assert found["no_grad"] == moved  # nothing more
    assert found["closed"] == (True, False, False)


def test_flags_that_would_move_nothing_are_refused(found):
    for text, (largest, bound) in zip(
        found["small"], ((4096, 524288), (4096, 4097), (2048, 2049)), strict=True
    ):
        assert (
            f"could be swapped has {largest} bytes; give a --swap-min-bytes below {bound}" in text
        )


def test_wrong_waits_are_caught(alone, found):
    for name in ("missing wait", "early free"):
        late, early = found[name]
        assert late["numbers"] != alone["attention"][0]["numbers"]
        # As on hardware whose copies happen to have run.
        assert early["numbers"] == alone["attention"][0]["numbers"]


def test_without_its_parameter_a_linear_layer_would_lose_its_gradient(found):
    assert "param.grad being None is not safe" in found["lost"]


STAGES = {"pipeline_model_parallel_size": 2}
VIRTUAL = {**STAGES, "virtual_pipeline_model_parallel_size": 2}
TENSOR = {"tensor_model_parallel_size": 2}
DATA = {"use_distributed_optimizer": True, "overlap_param_gather": True}
MLPS = {**SWAP, "recompute_num_layers": 1}
# Name -> how two ranks divide the work, and the flags that change nothing.
DIVIDED = {
    "pipeline": (STAGES, MLPS),
    "virtual pipeline": (VIRTUAL, MLPS),
    "inputs of virtual stages": ({"num_layers": 8, **VIRTUAL, **FULL}, INPUTS),
    "tensor and sequence": ({**TENSOR, "sequence_parallel": True}, MLPS),
    "divided inputs": ({**TENSOR, **FULL, "distribute_saved_activations": True}, INPUTS),
    "data": ({**FUSED, **DATA}, SWAP),
    "context": ({"context_parallel_size": 2, "context_parallel_algo": "megatron_cp_algo"}, SWAP),
}


def two_ranks(rank, world_size):
    import os

    from support.memory_runs import train

    os.environ["MS_MEMORY_SIM"] = str(rank)
    found = {}
    for name, (rest, flags) in DIVIDED.items():
        often = {"steps": 2, "evaluate": True} if "pipeline" in name else {}
        found[name] = [train({**rest, **more}, **often) for more in ({}, flags)]
    return found


@pytest.fixture(scope="module")
def ranks():
    return run_ranks(two_ranks, 2, preload="megatron")


@pytest.mark.parametrize("name", DIVIDED)
def test_divided_models(ranks, name):
    for found in ranks:
        plain, swapped = found[name]
        assert swapped["numbers"] == plain["numbers"]
        assert swapped["parameters"] == plain["parameters"]
        assert swapped["moved"] > 0
        assert swapped["left"] == 0


def test_bytes_of_ranks(ranks):
    # Chunks share memory. Both run both micro-batches before the first backward; the second one's
    # inputs are the schedule's.
    assert ranks[0]["virtual pipeline"][1]["peak"] == 4 * KEPT - 2 * INPUT
    first, last = (found["pipeline"][1]["peak"] for found in ranks)
    # 1F1B: the first rank has two micro-batches in flight, and the last one. The input of the
    # last one's first layer stays: the schedule holds it.
    assert (first, last) == (2 * 2 * KEPT, KEPT - INPUT)
    # Every rank of two holds half the sequence, or half the heads.
    assert {found["tensor and sequence"][1]["peak"] for found in ranks} == {3 * KEPT // 2}
    assert {found["divided inputs"][1]["peak"] for found in ranks} == {3 * INPUT // 2}
