"""Each repair: the defect is there without it, the right behaviour with it."""

import functools
import logging
import os
import subprocess
import sys
import zlib

import pytest
import torch

from mindspeed.features.level0 import collectives, moe
from mindspeed.train.config import TrainConfig
from support.mutation import Mutation
from support.ranks import RankError, run_ranks

pytestmark = pytest.mark.megatron014

TINY = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "seq_length": 16,
    "micro_batch_size": 2,
    "global_batch_size": 4,
}


def on_megatron(fn, *args, ranks=1, **kwargs):
    return run_ranks(fn, ranks, *args, preload="megatron", timeout=120, **kwargs)[0]


def repaired():
    import mindspeed

    return mindspeed.activate(None, level=0)


def outcome(call):
    """The call's value, or the name of what it raised."""
    try:
        return call()
    except Exception as error:
        return type(error).__name__


# The norm refuses sequence parallelism, zero-centred gamma and persistent kernels.


def norms(rank, world_size):
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    def build(**options):
        config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1)
        vars(config).update(params_dtype=torch.bfloat16, **options)
        return WrappedTorchNorm(config, 8, eps=1e-3)

    refused = [
        outcome(functools.partial(build, **{name: True}))
        for name in ("sequence_parallel", "layernorm_zero_centered_gamma", "persist_layer_norm")
    ]
    x = torch.randn(4, 8, dtype=torch.float64)
    with repaired():
        plain = build(normalization="LayerNorm", persist_layer_norm=True)
        tagged = build(normalization="RMSNorm", sequence_parallel=True)
        centred = [
            build(normalization=kind, layernorm_zero_centered_gamma=True).double()
            for kind in ("LayerNorm", "RMSNorm")
        ]
        for norm in centred:
            torch.nn.init.normal_(norm.weight)
        facts = [(p.dtype, p.sequence_parallel) for n in (plain, tagged) for p in n.parameters()]
        values = [norm(x) for norm in centred]
        weights = [norm.weight.detach() for norm in centred]
        unknown = outcome(lambda: build(normalization="Other"))
    return refused, facts, x, values, weights, unknown


def test_every_setting_of_the_norm_is_served():
    refused, facts, x, values, weights, unknown = on_megatron(norms)
    assert refused == ["AssertionError"] * 3
    assert facts == [(torch.bfloat16, False)] * 2 + [(torch.bfloat16, True)]
    layer = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-3).sqrt()
    rms = x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt()
    for got, plain, weight in zip(values, (layer, rms), weights, strict=True):
        torch.testing.assert_close(got, plain * (1 + weight), rtol=1e-12, atol=1e-12)
    assert unknown == "Exception"


def sequence_parallel_losses(rank, world_size):
    from mindspeed.train.trainer import Trainer

    split = {"tensor_model_parallel_size": world_size, "sequence_parallel": world_size > 1}
    with Trainer(TrainConfig.of(**TINY, **split)) as trainer:
        return [r.grad_norm for r in trainer.run(3)]


def test_a_norm_without_its_sequence_parallel_tag_is_caught():
    untagged = Mutation(
        "untagged norm",
        "mindspeed.features.level0.norm:build_norm",
        "= config.sequence_parallel",
        "= False",
    )
    want = on_megatron(sequence_parallel_losses)
    good = on_megatron(sequence_parallel_losses, ranks=2)
    bad = on_megatron(sequence_parallel_losses, ranks=2, mutate=[untagged])
    assert good == pytest.approx(want, abs=1e-5)
    assert bad != pytest.approx(want, abs=1e-3)


# The router's kernel name is unbound; GroupedMLP wants a package.


def router(rank, world_size):
    from megatron.core.transformer.moe import moe_utils

    x, w = torch.randn(3, 4, requires_grad=True), torch.randn(2, 4, requires_grad=True)

    def gate():
        out = moe_utils.RouterGatingLinearFunction.apply(x, w, *extra, torch.float32)
        out.backward(torch.ones_like(out))
        return out

    code = moe_utils.RouterGatingLinearFunction.forward.__code__
    extra = (None,) if "bias" in code.co_varnames[: code.co_argcount] else ()
    before = outcome(gate)
    with repaired():
        out = gate()
        bound = moe_utils.te_general_gemm
    return before, bound, out.detach(), (x @ w.t()).detach(), hasattr(moe_utils, "te_general_gemm")


def test_the_router_runs_without_transformer_engine():
    before, bound, got, want, left = on_megatron(router)
    assert before == "NameError"
    assert bound is None
    assert torch.equal(got, want)
    assert not left


@pytest.mark.parametrize("trans_b", [False, True])
@pytest.mark.parametrize("sizes", [[3, 0, 5, 1], [0, 0, 0, 0], [9, 0, 0, 0]])
def test_the_loop_multiplies_each_group_by_its_own_matrix(sizes, trans_b):
    a = torch.randn(sum(sizes), 4, dtype=torch.float64, requires_grad=True)
    b = torch.randn(4, 4, 6, dtype=torch.float64, requires_grad=True)
    given = b.transpose(1, 2).contiguous() if trans_b else b
    got = moe.LOOP.gmm(a, given, torch.tensor(sizes), trans_b=trans_b)
    group = torch.repeat_interleave(torch.arange(4), torch.tensor(sizes))
    want = torch.einsum("tk,tkn->tn", a, b[group])
    torch.testing.assert_close(got, want)
    grad = torch.randn_like(want)
    for x, y in zip(
        torch.autograd.grad(got, (a, b), grad),
        torch.autograd.grad(want, (a, b), grad),
        strict=True,
    ):
        torch.testing.assert_close(x, y)


# Recomputation.


def recompute_flags(rank, world_size):
    from megatron.core.tensor_parallel.random import CheckpointWithoutOutput

    before = CheckpointWithoutOutput(fp8=False).fp8
    with repaired():
        return before, CheckpointWithoutOutput(fp8=False).fp8, CheckpointWithoutOutput(True).fp8


def test_fp8_off_is_off():
    assert on_megatron(recompute_flags) == (True, False, True)


def returned_parameter(rank, world_size):
    from megatron.core.tensor_parallel.random import checkpoint

    def forward(bias):
        x = torch.ones(2, requires_grad=True)
        return x, *checkpoint(lambda x: (x * 3, bias), False, x)

    before = torch.nn.Parameter(torch.zeros(2))
    forward(before)  # its backward would recompute for ever
    bias = torch.nn.Parameter(torch.zeros(2))
    with repaired():
        x, out, alias = forward(bias)
        (out + 2 * alias).sum().backward()
    return before.is_leaf, bias.is_leaf, x.grad.tolist(), bias.grad.tolist()


def test_a_returned_parameter_stays_a_leaf_and_gets_its_gradient():
    assert on_megatron(returned_parameter) == (False, True, [3.0, 3.0], [2.0, 2.0])


# The fused cross entropy rounds gradients to bfloat16.


def cross_entropy_gradients(rank, world_size):
    from megatron.core import parallel_state
    from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy
    from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy

    parallel_state.initialize_model_parallel(tensor_model_parallel_size=world_size)
    group = parallel_state.get_tensor_model_parallel_group()
    logits = torch.randn(5, 2, 8 * world_size)[..., rank * 8 : (rank + 1) * 8]
    target = torch.randint(8 * world_size, (5, 2))
    weight = torch.rand(5, 2)

    def gradient(loss, dtype=torch.float32, **kwargs):
        x = logits.to(dtype).clone().requires_grad_()
        (loss(x, target, **kwargs) * weight).sum().backward()
        return x.grad

    want = gradient(vocab_parallel_cross_entropy)
    before = gradient(fused_vocab_parallel_cross_entropy, tp_group=group)
    with repaired():
        after = gradient(fused_vocab_parallel_cross_entropy, tp_group=group)
        low = gradient(fused_vocab_parallel_cross_entropy, torch.bfloat16, tp_group=group)
    return [(g - want).abs().max().item() for g in (before, after)], low.dtype


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_fused_cross_entropy_keeps_the_precision_of_the_logits(ranks):
    # The compiled form is Megatron's choice and torch's work; the arithmetic is what counts here.
    env = {"TORCHDYNAMO_DISABLE": "1"}
    (before, after), low = on_megatron(cross_entropy_gradients, ranks=ranks, env=env)
    assert before > 1e-4
    assert after < 1e-6
    assert low is torch.bfloat16


# The distributed optimizer over torch's Adam.


def resumed(rank, world_size, folder, part):
    """Losses of steps 1-6 in one go, of 1-3 with a save, or of 4-6 after a load."""
    from mindspeed.train.trainer import Trainer

    config = TrainConfig.of(**TINY, use_distributed_optimizer=True, lr=1e-2)
    with Trainer(config) as trainer:
        if part == "second":
            trainer.load(folder)
            return [r.loss for r in trainer.run(3)]
        losses = [r.loss for r in trainer.run(6 if part == "whole" else 3)]
        if part == "first":
            trainer.save(folder)
        return losses


def test_the_distributed_optimizer_resumes_bit_for_bit(tmp_path):
    run = functools.partial(on_megatron, resumed, str(tmp_path), ranks=2)
    whole = run("whole")
    assert run("first") == whole[:3]
    assert run("second") == whole[3:]
    shared = Mutation(
        "one step tensor for all",
        "mindspeed.features.level0.optimizer:wrap_set_states",
        ".clone()",
        "",
    )
    assert run("second", mutate=[shared])[2] != whole[5]


# Unequal shards on gloo.


def gathered(rank, world_size, sizes, tail):
    from megatron.core.tensor_parallel.mappings import _gather_along_first_dim as before

    x = torch.full((sizes[rank], *tail), float(rank))
    group = torch.distributed.group.WORLD
    plain = outcome(lambda: before(x, group, sizes)) if len(set(sizes)) > 1 else "not tried"
    with repaired():
        from megatron.core.tensor_parallel import mappings

        got = mappings._gather_along_first_dim(x, group, sizes)
        even = mappings._gather_along_first_dim(torch.full((2,), float(rank)), group)
    return plain, got, even


@pytest.mark.parametrize(
    ("sizes", "tail"), [([3, 1], (2,)), ([0, 4], (2, 3)), ([2, 2], ()), ([1, 5, 0, 2], (3,))]
)
def test_unequal_shards_are_gathered(sizes, tail):
    plain, got, even = on_megatron(gathered, sizes, tail, ranks=len(sizes))
    assert plain in ("RuntimeError", "ValueError", "not tried")
    want = [torch.full((size, *tail), float(rank)) for rank, size in enumerate(sizes)]
    assert torch.equal(got, torch.cat(want))
    assert even.tolist() == [float(r) for r in range(len(sizes)) for _ in range(2)]


def gather_only(rank, world_size, sizes):
    x = torch.full((sizes[rank], 2), float(rank + 1))
    return collectives.gather_unequal(x, torch.distributed.group.WORLD, sizes)


def test_a_shard_cut_at_the_wrong_size_is_caught():
    sizes = [1, 3]
    uncut = Mutation(
        "padding kept",
        "mindspeed.features.level0.collectives:gather_unequal",
        "shard[:size]",
        "shard",
    )
    assert run_ranks(gather_only, 2, sizes)[0].shape == (4, 2)
    assert run_ranks(gather_only, 2, sizes, mutate=[uncut])[0].shape == (6, 2)


# One generator on the CPU.


def forks(rank, world_size):
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    records = []
    logging.getLogger("megatron.core.tensor_parallel.random").addHandler(
        type("H", (logging.Handler,), {"emit": lambda self, r: records.append(r.getMessage())})()
    )

    def draw():
        torch.manual_seed(1)
        tracker = CudaRNGStatesTracker()
        tracker.add("a", 7)
        tracker.add("b", 8)
        with tracker.fork("a"):
            first = torch.rand(2)
            with tracker.fork("b"):
                other = torch.rand(2)
            second = torch.rand(2)
        outer = torch.rand(2)
        with tracker.fork("a"):
            third = torch.rand(2)
        return torch.cat([first, second, third, other, outer]).tolist()

    before, warned = draw(), len(records)
    with repaired():
        after = draw()
        unknown = outcome(lambda: CudaRNGStatesTracker().fork("c").__enter__())
    return before, warned, after, len(records), unknown


def test_forked_streams_continue_and_nobody_warns():
    before, warned, after, total, unknown = on_megatron(forks)
    assert warned > 0
    assert total == warned
    streams = {
        seed: torch.rand(6, generator=torch.Generator().manual_seed(seed)) for seed in (7, 8)
    }
    assert after[:6] == streams[7].tolist()
    assert after[6:8] == streams[8][:2].tolist()
    assert after[8:] == torch.rand(2, generator=torch.Generator().manual_seed(1)).tolist()
    assert before == after
    assert unknown == "KeyError"


def foreign_stream(rank, world_size):
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    with repaired():
        tracker = CudaRNGStatesTracker()
        tracker.add("a", 7)
        tracker.set_states({"a": torch.zeros(16, dtype=torch.uint8)})
        skipped = pytest.warns(UserWarning, match="'a' comes from another kind of device")
        with skipped, tracker.fork("a"):
            first = torch.rand(3)
        with tracker.fork("a"):
            second = torch.rand(3)
    return first.tolist(), second.tolist()


def test_a_stream_of_another_device_starts_anew_and_then_goes_on():
    first, second = on_megatron(foreign_stream)
    generator = torch.Generator().manual_seed(zlib.crc32(b"a"))
    assert first + second == torch.rand(6, generator=generator).tolist()


# An absent TransformerEngine.


def engine_version(rank, world_size):
    from megatron.core import utils

    before = outcome(lambda: utils.is_te_min_version("1.0"))
    with repaired():
        return before, utils.is_te_min_version("1.0"), utils.is_te_min_version("0", False)


def test_an_absent_transformer_engine_is_older_than_any_version():
    assert on_megatron(engine_version) == ("TypeError", False, False)


# Whole runs without the repairs fail: the probes are not taken for granted.


def bare_training(rank, world_size, options):
    from mindspeed.train import trainer

    trainer.activate_level = lambda config: None
    with trainer.Trainer(TrainConfig.of(**TINY, **options)) as run:
        return [r.loss for r in run.run(2)]


@pytest.mark.parametrize(
    ("options", "ranks", "error"),
    [
        ({"tensor_model_parallel_size": 2, "sequence_parallel": True}, 2, "AssertionError"),
        ({"num_experts": 2, "add_bias_linear": False}, 1, "NameError"),
        ({"num_experts": 2, "add_bias_linear": False, "moe_grouped_gemm": True}, 1, "Error"),
    ],
)
def test_without_the_repairs_training_fails(options, ranks, error):
    with pytest.raises(RankError, match=error):
        on_megatron(bare_training, options, ranks=ranks)
    if not options.get("moe_grouped_gemm"):
        assert len(on_megatron(with_repairs, options, ranks=ranks)) == 2


def with_repairs(rank, world_size, options):
    from mindspeed.train.trainer import Trainer

    with Trainer(TrainConfig.of(**TINY, **options)) as run:
        return [r.loss for r in run.run(2)]


def test_a_missing_psutil_stops_the_import_instead_of_hanging_a_save(tmp_path):
    (tmp_path / "psutil.py").write_text("raise ImportError('no psutil')")
    done = subprocess.run(
        [sys.executable, "-c", "import mindspeed.megatron_adaptor"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode
    assert "no psutil" in done.stderr
