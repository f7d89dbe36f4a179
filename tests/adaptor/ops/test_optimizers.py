"""The AdamWs of --optimizer-selection in Megatron: trajectories, checkpoints, averages, resuming.

A group of ranks checks many things in one go; what is compared is what a rank holds, in bits.
"""

import contextlib
import sys
from types import ModuleType, SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist

import mindspeed
from mindspeed import PlanError
from mindspeed.features.ops import optimizer_builder
from mindspeed.features.ops.ema_model import ema_model
from support.mutation import Mutation
from support.ranks import run_ranks

TINY = {
    "num_layers": 1,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "seq_length": 16,
    "vocab_size": 61,
    "make_vocab_size_divisible_by": 64,
    "micro_batch_size": 1,
    "global_batch_size": 4,
    "train_iters": 6,
    "lr": 1e-2,
    "hidden_dropout": 0.1,
}
SHARED = {"use_distributed_optimizer": True, "ddp_bucket_size": 5000}
OVERLAP = {**SHARED, "overlap_grad_reduce": True, "overlap_param_gather": True}
# Ranks, options, and what checkpoints are exchanged with level 0.
LAYOUTS = {
    "fp32": (1, {}, "fused_torch_adamw"),
    "bf16": (2, {"bf16": True}, None),
    "shared": (1, SHARED, None),
    "shared_bf16_overlapped": (2, {**OVERLAP, "bf16": True}, "fused_adamw"),
}
AVERAGES = "mindspeed.features.level0.averages"
CLASSES = {
    "": "AdamW",
    "fused_adamw": "FusedAdamW",
    "fused_torch_adamw": "AdamW",
    "fused_ema_adamw": "FusedEmaAdamW",
}


@contextlib.contextmanager
def opened(options, selection):
    """A trainer at level 0 (no selection) or 1."""
    from mindspeed.train import TrainConfig
    from mindspeed.train.trainer import Trainer

    flags = (("optimizer_selection", selection),) if selection else ()
    if selection == "fused_ema_adamw":
        flags = (("ema_decay", 0.9), *flags)
    config = TrainConfig.of(
        **TINY, **options, optimization_level=int(bool(selection)), feature_flags=flags
    )
    with Trainer(config) as trainer:
        assert type(parts(trainer)[0].optimizer).__name__ == CLASSES[selection]
        yield trainer


def parts(trainer):
    return getattr(trainer.optimizer, "chained_optimizers", [trainer.optimizer])


def states(trainer, *names):
    """Every fp32 weight and state of this rank, and the counters of the groups."""
    found = []
    for part in parts(trainer):
        for group in part.optimizer.param_groups:
            found.append(torch.tensor(group.get("num_updates", 0)))
            for p in group["params"]:
                state = part.optimizer.state[p]
                values = [p, *(state[n] for n in names or sorted(state))]
                found.extend(v.detach().clone() for v in values)
    return found


def held(trainer):
    """The model's weights as they lie there; an overlapped gather may not have come yet."""
    return [p.detach().clone() for p in trainer.parameters().values()]


def weights(trainer):
    with trainer.whole_parameters():
        return held(trainer)


def same(mine, theirs):
    assert len(mine) == len(theirs) > 0
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def follow_torch(trainer, steps):
    """Each step of the chosen optimizer is torch's, on the very gradients that it gets; averages
    are those of the formula.
    """
    (part,) = parts(trainer)
    inner = part.optimizer
    mine = [p for g in inner.param_groups for p in g["params"]]
    twins = {p: p.detach().clone() for p in mine}
    torchs = torch.optim.AdamW([{"params": []}], foreach=False)
    torchs.param_groups = [
        {**g, "params": [twins[p] for p in g["params"]], "fused": None} for g in inner.param_groups
    ]
    for p in mine:
        torchs.state[twins[p]] = {
            name: value.clone() for name, value in inner.state.get(p, {}).items()
        }

    def step(*_):
        for group, own in zip(torchs.param_groups, inner.param_groups, strict=True):
            group["lr"] = own["lr"]
        for p in mine:
            twins[p].grad = p.grad.detach().clone()
        torchs.step()

    hook = inner.register_step_pre_hook(step)
    averages = {p: p.detach().clone() for p in mine}
    for n in range(1, steps + 1):
        trainer.train_step()
        d = min(0.9, (1 + n) / (10 + n))
        for p in mine:
            torch.testing.assert_close(p.detach(), twins[p], rtol=2e-6, atol=2e-7)
            averages[p] = d * averages[p] + (1 - d) * p.detach()
            found = inner.state[p].get("ema_params", averages[p])
            torch.testing.assert_close(found, averages[p], rtol=1e-6, atol=1e-7)
    hook.remove()


def average_in_the_model(trainer):
    """Inside, every rank's model is the average; a failure inside leaves the weights as before."""
    loss = trainer.evaluate(1)
    before, kept = weights(trainer), states(trainer)
    with contextlib.suppress(KeyError), ema_model(trainer.optimizer):
        inside = held(trainer)
        assert trainer.evaluate(1) != loss
        for each in gathered(inside):
            same(inside, each)
        for part in parts(trainer):
            for group in part.optimizer.param_groups:
                for p in group["params"]:
                    assert torch.equal(p, part.optimizer.state[p]["ema_params"])
        raise KeyError
    same(held(trainer), before)
    assert trainer.evaluate(1) == loss
    same(states(trainer), kept)
    assert not all(torch.equal(a, b) for a, b in zip(inside, before, strict=True))


def gathered(tensors):
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, tensors)
    return found


def train_with_averages(options, folder, start=None):
    """Six steps, saved after three, with the averages in the model in between.

    They go on from a checkpoint of level 0, where there is one.
    """
    with opened(options, "fused_ema_adamw") as trainer:
        if start is not None:
            trainer.load(start)
            check_averages_start_at_the_weights(trainer)
        follow_torch(trainer, 3)
        trainer.save(folder)
        average_in_the_model(trainer)
        losses = [r.loss for r in trainer.run(3)]
        inner = parts(trainer)[0].optimizer
        assert inner.decay(inner.param_groups[0]) == 7 / 16
        return losses, states(trainer), weights(trainer)


def check_resumed(options, folder, wanted):
    """Three steps after the checkpoint: losses, weights, averages and counters, bit for bit."""
    with opened(options, "fused_ema_adamw") as trainer:
        trainer.load(folder)
        assert [r.loss for r in trainer.run(3)] == wanted[0]
        same(states(trainer), wanted[1])
        same(weights(trainer), wanted[2])


def exchange(options, selection, folder):
    """A checkpoint of level 0 loads at level 1 with its bits, and one of level 1 at level 0."""
    names = ("exp_avg", "exp_avg_sq", "step")
    with opened(options, "") as trainer:
        trainer.run(2)
        trainer.save(f"{folder}/zero")
        zero = states(trainer, *names)
    with opened(options, selection) as trainer:
        trainer.load(f"{folder}/zero")
        same(states(trainer, *names), zero)
        follow_torch(trainer, 2)
        trainer.save(f"{folder}/one")
        one = states(trainer, *names)
    with opened(options, "") as trainer:
        trainer.load(f"{folder}/one")
        same(states(trainer, *names), one)
        assert not any(g.get("fused") for p in parts(trainer) for g in p.optimizer.param_groups)
        trainer.run(1)


WARM_UP_LOST = Mutation(
    "the warm-up starts anew",
    "ms_ops.optim.averaged:FusedEmaAdamW.__setstate__",
    "self._check(group)",
    'self._check(group); group["num_updates"] = 0',
)
# What a checkpoint is written with.
AVERAGES_LOST = Mutation(
    "averages are not gathered",
    f"{AVERAGES}:_gather",
    "mine[place] = average_of(optimizer, parameter)",
    "pass",
)
PADDING_COUNTED = Mutation(
    "padding between buckets is counted",
    "mindspeed.features.level0.optimizer:without_padding",
    "start - shifts[bucket], end - shifts[bucket]",
    "start, end",
)


def check_layout(rank, world_size, name, folder):
    _, options, selection = LAYOUTS[name]
    if selection:
        exchange(options, selection, folder)
    start = f"{folder}/zero" if selection else None
    wanted = train_with_averages(options, f"{folder}/ema", start)
    check_resumed(options, f"{folder}/ema", wanted)


@pytest.mark.megatron014
@pytest.mark.parametrize("name", LAYOUTS)
def test_trajectory_exchange_and_resume(name, tmp_path):
    ranks, *_ = LAYOUTS[name]
    run_ranks(check_layout, ranks, name, str(tmp_path), preload="megatron", timeout=120)


def scramble(trainer):
    """Other values in every weight and state of this rank."""
    with torch.no_grad():
        for part in parts(trainer):
            for group in part.optimizer.param_groups:
                group["num_updates"] = 99
                for p in group["params"]:
                    for value in (p, *part.optimizer.state[p].values()):
                        value.fill_(7)


def formats():
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer as Optimizer

    if hasattr(Optimizer, "sharded_param_state_fully_reshardable"):
        return ["fully_reshardable", "dp_reshardable", "dp_zero_gather_scatter"]
    return ["fully_sharded_model_space", "dp_zero_gather_scatter"]


def check_formats(rank, world_size, folder):
    """Every format of the distributed optimizer brings every bit back; faulty savers do not."""
    from mindspeed.train import checkpoint

    _, options, _ = LAYOUTS["shared_bf16_overlapped"]
    with opened(options, "fused_ema_adamw") as trainer:
        trainer.run(2)
        kept, model = states(trainer), weights(trainer)

        def of(form):
            return mock.patch.object(checkpoint, "_sharding_type", return_value=form)

        def stored(path, form):
            with of(form):
                trainer.save(path)

        def loaded(path, form):
            scramble(trainer)
            with of(form):
                trainer.load(path)
            same(states(trainer), kept)
            same(weights(trainer), model)

        known = formats()
        for form in known:
            stored(f"{folder}/{form}", form)
        faulty = {"dp_zero_gather_scatter": AVERAGES_LOST, "fully_reshardable": PADDING_COUNTED}
        for form in faulty.keys() & set(known):
            with faulty[form].applied():
                stored(f"{folder}/faulty_{form}", form)
            with pytest.raises(AssertionError):
                loaded(f"{folder}/faulty_{form}", form)
        for form in known:
            loaded(f"{folder}/{form}", form)
        with WARM_UP_LOST.applied(), pytest.raises(AssertionError):
            loaded(f"{folder}/{known[0]}", known[0])
        loaded(f"{folder}/{known[0]}", known[0])
        check_plain_files(trainer, f"{folder}/states.pt", kept)


def check_averages_start_at_the_weights(trainer):
    for part in parts(trainer):
        for group in part.optimizer.param_groups:
            for p in group["params"]:
                assert torch.equal(part.optimizer.state[p]["ema_params"], p)


def check_plain_files(trainer, path, kept):
    """Megatron-LM's `torch` format; a file without averages starts them at the weights."""
    (part,) = parts(trainer)
    common = part.state_dict()
    part.save_parameter_state(path)
    scramble(trainer)
    part.load_state_dict(common)
    part.load_parameter_state(path)
    same(states(trainer), kept)
    if dist.get_rank() == 0:
        found = torch.load(path, weights_only=False)
        for by_dtype in (v for v in found.values() if isinstance(v, dict)):
            for tensors in by_dtype.values():
                del tensors["ema_params"]
        torch.save(found, path)
    part.load_parameter_state(path)
    check_averages_start_at_the_weights(trainer)


@pytest.mark.megatron014
def test_every_format_holds_the_averages(tmp_path):
    run_ranks(check_formats, 2, str(tmp_path), preload="megatron", timeout=120)


def problems(level=1, **values):
    with pytest.raises(PlanError) as raised:
        mindspeed.plan(values, level=level)
    return str(raised.value)


def test_flags_that_cannot_act():
    ema = {"optimizer_selection": "fused_ema_adamw"}
    assert "acts only with --optimizer-selection" in problems(ema_decay=0.99)
    for decay in (-0.1, 1.5):
        assert "--ema-decay must lie in [0, 1]" in problems(**ema, ema_decay=decay)
    assert "--optimizer is sgd" in problems(**ema, optimizer="sgd")
    assert "averages need fp32" in problems(**ema, reuse_fp32_param=True)
    assert "swapped hold no averages" in problems(**ema, swap_optimizer=True)
    for other in ("use_torch_fsdp2", "optimizer_cpu_offload", "use_precision_aware_optimizer"):
        assert "have their own" in problems(**{**ema, other: True})
    assert "optimization level 1" in problems(level=0, **ema)


@pytest.mark.parametrize("decay", [0, 0.5, 1])
def test_both_ends_of_the_decay_are_allowed(decay):
    made = mindspeed.plan({"optimizer_selection": "fused_ema_adamw", "ema_decay": decay}, level=1)
    assert "level0.averages" in made.features
    assert "level0.averages" not in mindspeed.plan(level=1).features


def builders(plan):
    place = "megatron.core.optimizer:_get_megatron_optimizer_based_on_param_groups"
    return [s.patch.value for s in plan.acting if s.patch.target == place]


def test_the_plan_names_the_optimizer():
    place = "mindspeed.features.ops.optimizer_builder"
    assert builders(mindspeed.plan(level=1)) == [f"{place}:wrap_fused"]
    assert builders(mindspeed.plan({"use_torch_fsdp2": True}, level=1)) == []
    assert builders(mindspeed.plan(level=0)) == []
    chosen = mindspeed.plan({"optimizer_selection": "fused_torch_adamw"}, level=1)
    assert builders(chosen) == [f"{place}:wrap_torch"]


class FusedAdam(torch.optim.Adam):
    """What TransformerEngine or Apex would bring."""


def build(wrap, adam, **config):
    """What the wrapped builder makes of Megatron's optimizer around `adam`."""
    made = SimpleNamespace(optimizer=adam, init_state_fn=None)
    return wrap(lambda config: made)(SimpleNamespace(optimizer="adam", **config))


def test_a_fused_adam_of_another_library_stays_or_is_refused():
    adam = FusedAdam([torch.zeros(1)])
    assert build(optimizer_builder.wrap_fused, adam).optimizer is adam
    for wrap in (optimizer_builder.wrap_torch, optimizer_builder.wrap_averaged):
        with pytest.raises(ValueError, match=r"brought .*FusedAdam: leave the flag out"):
            build(wrap, adam)


def test_where_the_decay_comes_from(monkeypatch):
    def decay(**config):
        adam = torch.optim.AdamW([torch.zeros(1)])
        return build(optimizer_builder.wrap_averaged, adam, **config).optimizer.ema_decay

    assert decay(ema_decay=0.5) == 0.5
    assert decay() == 0.9999
    training = ModuleType("megatron.training.global_vars")
    monkeypatch.setitem(sys.modules, training.__name__, training)
    assert decay() == 0.9999
    training._GLOBAL_ARGS = SimpleNamespace(ema_decay=0.25)
    assert decay() == 0.25


def test_no_averages_to_show():
    made = build(optimizer_builder.wrap_fused, torch.optim.AdamW([torch.zeros(1)]))
    with (
        pytest.raises(ValueError, match="need one built with --optimizer-selection"),
        ema_model(made),
    ):
        pass
