"""--reuse-fp32-param in Megatron's optimizers: trajectories, bytes, checkpoints, skipped steps.

What is compared is what ranks hold, in bits, with Megatron's own fp32 masters.
"""

import contextlib
import gc

import pytest
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


def run(check, ranks, *args):
    run_ranks(check, ranks, *args, preload="megatron", timeout=120, env=ENV)


@contextlib.contextmanager
def opened(options, flags):
    from mindspeed.train import TrainConfig
    from mindspeed.train.trainer import Trainer

    config = TrainConfig.of(
        **{**TINY, **options}, optimization_level=2, feature_flags=tuple(flags.items())
    )
    with Trainer(config) as trainer:
        packed = type(part(trainer)).__name__.startswith("Held")
        assert packed == bool(flags.get("reuse_fp32_param"))
        yield trainer


def part(trainer):
    (found,) = getattr(trainer.optimizer, "chained_optimizers", [trainer.optimizer])
    return found


def own(trainer):
    """Name of a parameter of the model to this rank's part: start, inner parameter."""
    optimizer, found = part(trainer), {}
    for name, p in trainer.chunks[0].named_parameters():
        if hasattr(optimizer, "model_param_group_index_map"):
            if p in optimizer.model_param_group_index_map:
                group, order = optimizer.model_param_group_index_map[p]
                start = optimizer._get_model_param_range_map(p)["param"].start
                found[name] = start, optimizer.optimizer.param_groups[group]["params"][order]
        else:
            found[name] = 0, getattr(p, "main_param", p)
    return found


def masters(trainer):
    """All states of this rank, flat fp32, by name of the parameter."""
    inner, found = part(trainer).optimizer, {}
    for name, (start, p) in own(trainer).items():
        master = inner.master(p) if hasattr(inner, "master") else p.detach().clone()
        state = inner.state[p]
        moments = [state[k].reshape(-1).clone() for k in ("exp_avg", "exp_avg_sq")]
        found[name] = start, (master.reshape(-1), *moments, state["step"].clone().reshape(1))
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
    """Bytes of all tensors of this process."""
    gc.collect()
    tensors = [each for each in gc.get_objects() if isinstance(each, torch.Tensor)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def trained(options, flags, steps):
    """What steps lead to, the bytes that they leave behind, and how many weights this rank owns."""
    before = alive()
    with opened(options, flags) as trainer:
        found = facts(trainer, steps)
        owned = sum(p.numel() for _, p in own(trainer).values())
        trainer.optimizer.zero_grad()
        held = alive() - before
        if flags:
            assert part(trainer).optimizer.nbytes() == owned * (2 + 4 + 4) + 8 * ties(trainer)
            held -= 8 * ties(trainer)
    return found, held, owned


def ties(trainer):
    return sum(len(packed._ties) for packed in part(trainer).optimizer.packed)


def step(trainer, steps):
    """Steps on gradients that fall from the sky, clipped."""
    drawn = torch.Generator().manual_seed(5)
    for _ in range(steps):
        trainer.optimizer.zero_grad()
        for buffer in trainer.chunks[0].buffers:
            buffer.grad_data.normal_(generator=drawn)
        assert trainer.optimizer.step()[0]
        yield


def check_trajectory(rank, world_size, options, steps):
    """Losses, masters, moments and weights are those with fp32 masters, in 2 bytes a weight less.

    Rounding ties away changes no printed digit in so few steps.
    """
    trained(options, NATIVE, 1)  # what is made once
    wanted, dense, owned = trained(options, NATIVE, steps)
    found, packed, _ = trained(options, EXACT, steps)
    agree(found, wanted)
    assert dense - packed == 2 * owned > 0
    found, packed, _ = trained(options, AWAY, 2)
    assert dense - packed == 2 * owned
    for mine, other in zip(found[0], wanted[0], strict=False):
        assert [f"{x:.4f}" for x in mine] == [f"{x:.4f}" for x in other]


def check_100_steps(rank, world_size):
    found = []
    for flags in (NATIVE, EXACT):
        with opened({}, flags) as trainer:
            tied = [ties(trainer) if flags else 1 for _ in step(trainer, 100)]
            assert any(tied)
            found.append((whole(trainer), weights(trainer)))
    same(found[0][0], found[1][0])
    same(found[0][1], found[1][1])


def test_trajectory_100():
    run(check_100_steps, 1)


@pytest.mark.megatron014
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_D123_gloo(ranks):
    run(check_trajectory, ranks, OVERLAP if ranks == 2 else SHARED, 5)
