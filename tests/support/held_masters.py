"""Megatron's optimizers with fp32 masters and without: what ranks hold, in bits."""

from __future__ import annotations

import contextlib
import gc
import time

import torch
import torch.distributed as dist

from support.ranks import run_ranks

TINY = {
    "num_layers": 1,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "seq_length": 8,
    "vocab_size": 61,
    "make_vocab_size_divisible_by": 64,
    "micro_batch_size": 1,
    "global_batch_size": 6,
    "train_iters": 100,
    "lr": 1e-2,
    "hidden_dropout": 0.1,
    "clip_grad": 0.5,
    "bf16": True,
}
SHARED = {"use_distributed_optimizer": True, "ddp_bucket_size": 5000}
OVERLAP = {**SHARED, "overlap_grad_reduce": True, "overlap_param_gather": True}
NATIVE = {}
AWAY = {"reuse_fp32_param": True}
EXACT = {"reuse_fp32_param": True, "npu_deterministic": True}
# Libraries read them before groups are made, which is before --npu-deterministic here.
ENV = {
    "CLOSE_MATMUL_K_SHIFT": "1",
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    "HCCL_DETERMINISTIC": "true",
    "NCCL_ALGO": "Ring",
}


def run(check, ranks, *args, mutate=(), **env):
    env = {**ENV, **env}
    run_ranks(check, ranks, *args, preload="megatron", timeout=240, env=env, mutate=mutate)


@contextlib.contextmanager
def opened(options, flags):
    from mindspeed.train import TrainConfig
    from mindspeed.train.trainer import Trainer

    config = TrainConfig.of(
        **{**TINY, **options}, optimization_level=2, feature_flags=tuple(flags.items())
    )
    with Trainer(config) as trainer:
        for each in parts(trainer):
            held = type(each).__name__.startswith("Held")
            assert held == bool({"reuse_fp32_param", "swap_optimizer"} & flags.keys())
        yield trainer


def parts(trainer):
    return getattr(trainer.optimizer, "chained_optimizers", [trainer.optimizer])


def part(trainer):
    (found,) = parts(trainer)
    return found


def own(trainer):
    """Name of a parameter of the model to this rank's part: start, inner parameter, optimizer."""
    from mindspeed.train.model import unwrap

    found = {}
    for name, p in unwrap(trainer.chunks[0]).named_parameters():
        for optimizer in parts(trainer):
            inner = optimizer.optimizer
            if p in getattr(optimizer, "model_param_group_index_map", ()):
                group, order = optimizer.model_param_group_index_map[p]
                start = optimizer._get_model_param_range_map(p)["param"].start
                found[name] = start, inner.param_groups[group]["params"][order], inner
            elif any(p is q for g in getattr(optimizer, "float16_groups", ()) for q in g):
                found[name] = 0, getattr(p, "main_param", p), inner
    return found


def master_of(inner, p):
    return inner.master(p) if hasattr(inner, "master") else p.detach().clone()


def masters(trainer):
    """All states of this rank, flat fp32, by name of the parameter."""
    found = {}
    for name, (start, p, inner) in own(trainer).items():
        read = getattr(inner, "get_unscaled_state", lambda p, key, of=inner.state: of[p][key])
        moments = [read(p, k).detach().reshape(-1).clone() for k in ("exp_avg", "exp_avg_sq")]
        found[name] = start, (master_of(inner, p).reshape(-1), *moments)
    return found


def whole(trainer):
    """Master and moments of the whole parameters, by name, at every rank."""
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, masters(trainer))
    found = {}
    for name in dict.fromkeys(name for each in parts for name in each):
        pieces = sorted((each[name] for each in parts if name in each), key=lambda piece: piece[0])
        if not trainer.config.optim.use_distributed_optimizer:
            pieces = pieces[:1]
        found[name] = [torch.cat([tensors[i] for _, tensors in pieces]) for i in range(3)]
    return found


def weights(trainer):
    with trainer.whole_parameters():
        return {name: p.clone() for name, p in trainer.parameters().items()}


def same(mine, theirs):
    assert mine.keys() == theirs.keys()
    assert len(mine) > 0
    for name, found in mine.items():
        other = theirs[name]
        if torch.is_tensor(found):
            found, other = [found], [other]
        assert all(torch.equal(a, b) for a, b in zip(found, other, strict=True)), name


def facts(trainer, steps):
    """What a number of steps leads to."""
    results = [(r.loss, r.grad_norm) for r in trainer.run(steps)]
    return results, whole(trainer), weights(trainer)


def agree(mine, theirs):
    assert mine[0] == theirs[0]
    same(mine[1], theirs[1])
    same(mine[2], theirs[2])


def alive():
    """Bytes of all tensors of this process.

    A thread of gloo may hold what it sent for a moment longer, so the least of some readings.
    """
    found = []
    for _ in range(5):
        gc.collect()
        tensors = [each for each in gc.get_objects() if isinstance(each, torch.Tensor)]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        found.append(sum(storages.values()))
        time.sleep(0.02)
    return min(found)


def step(trainer, steps):
    """Steps on gradients that fall from the sky, clipped."""
    drawn = torch.Generator().manual_seed(5)
    for _ in range(steps):
        trainer.optimizer.zero_grad()
        for buffer in trainer.chunks[0].buffers:
            buffer.grad_data.normal_(generator=drawn)
        yield trainer.optimizer.step()[0]


def gathered(value):
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def same_structure(mine, theirs):
    """The same keys and types everywhere, and tensors of the same shapes and dtypes."""
    assert type(mine) is type(theirs)
    if isinstance(mine, dict):
        assert mine.keys() == theirs.keys()
        pairs = [(mine[key], theirs[key]) for key in mine]
    elif isinstance(mine, list | tuple):
        pairs = list(zip(mine, theirs, strict=True))
    else:
        assert getattr(mine, "shape", None) == getattr(theirs, "shape", None)
        assert getattr(mine, "dtype", None) == getattr(theirs, "dtype", None)
        pairs = []
    for a, b in pairs:
        same_structure(a, b)


def skip(trainer):
    """A step whose gradients overflow changes nothing."""
    from megatron.core.optimizer.grad_scaler import ConstantGradScaler

    for optimizer in parts(trainer):
        optimizer.grad_scaler = ConstantGradScaler(2.0)
        optimizer.found_inf = torch.zeros(1)
    for p in trainer.chunks[0].parameters():
        p.main_grad.fill_(float("inf"))
    assert trainer.optimizer.step()[0] is False


def save_plain(trainer, folder):
    """Megatron-LM's `torch` format: a file of what is common, one of divided states."""
    optimizer = part(trainer)
    if hasattr(optimizer, "save_parameter_state"):
        optimizer.save_parameter_state(f"{folder}/states.pt")
    if dist.get_rank() == 0:
        torch.save(optimizer.state_dict(), f"{folder}/common.pt")
    dist.barrier()


def load_plain(trainer, folder):
    optimizer = part(trainer)
    optimizer.load_state_dict(torch.load(f"{folder}/common.pt"))
    if hasattr(optimizer, "load_parameter_state"):
        optimizer.load_parameter_state(f"{folder}/states.pt")


def consistent(trainer):
    """Every rank has the same weights, and they are the masters rounded."""
    mine = weights(trainer)
    for other in gathered(mine):
        same(mine, other)
    rounding = getattr(part(trainer).optimizer, "rounding", "rne")
    for name, (master, *_) in whole(trainer).items():
        weight = mine[name].reshape(-1)
        tied = master.view(torch.int32) & 0x1FFFF == 0x8000
        cast = master.to(torch.bfloat16)
        assert torch.equal(weight[~tied], cast[~tied])
        if rounding == "rne":
            assert torch.equal(weight, cast)
        else:
            assert (weight[tied] != cast[tied]).all()
