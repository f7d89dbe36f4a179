"""Documents on a divided sequence with pipeline stages, of which the first alone has tokens."""

from contextlib import suppress
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

from mindspeed.train.config import TrainConfig
from support.mutation import Mutation
from support.ranks import run_ranks

END, ROWS, LENGTH = 0, 2, 24
SMALL = {
    "num_layers": 4,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "seq_length": LENGTH,
    "vocab_size": 50,
    "micro_batch_size": ROWS,
    "global_batch_size": 4 * ROWS,
    "init_method_std": 0.2,
    "normalization": "RMSNorm",
    "optimization_level": 2,
}
TWO = {"pipeline_model_parallel_size": 2, "context_parallel_size": 2}
RING = {"context_parallel_algo": "megatron_cp_algo"}
# By the number of micro batches; groups of virtual stages need not divide it.
ALONE = {"3": {}, "5": {}}
DIVIDED = {"3": TWO, "5": {**TWO, **RING, "virtual_pipeline_model_parallel_size": 2}}
_HERE = "mindspeed.features.context.stages"
FIRST = Mutation(
    "first again", f"{_HERE}:_Pass.item", "return self._items[index]", "return self._items[0]"
)
STALE = Mutation("stale", f"{_HERE}:Link.begin", "self._passes += 1", "pass")


@dataclass(frozen=True)
class Documents:
    """Random tokens; how many end a document changes from sample to sample."""

    def __len__(self):
        return 10**6

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        tokens = torch.randint(1, 50, (LENGTH + 1,), generator=generator)
        often = (0.05, 0.4, 0.15)[index // ROWS % 3]
        tokens[torch.rand(LENGTH + 1, generator=generator) < often] = END
        places = torch.arange(LENGTH)
        return {
            "tokens": tokens[:-1],
            "labels": tokens[1:],
            "loss_mask": torch.ones(LENGTH),
            "position_ids": places,
        }


def config(options):
    leaves = TrainConfig().flat()
    given = {**options, "reset_attention_mask": True}
    flags = tuple(sorted((k, v) for k, v in given.items() if k not in leaves))
    return TrainConfig.of(
        **{**SMALL, **{k: v for k, v in given.items() if k in leaves}}, feature_flags=flags
    )


def mask_of(tokens):
    """Return bool [b, 1, S, S], True where a query must not attend."""
    ends = (tokens == END).long()
    number = torch.cumsum(ends, 1) - ends
    seen = (number.unsqueeze(2) == number.unsqueeze(1)).tril()
    return ~seen.unsqueeze(1)


def losses(rank, world_size, runs):
    """Train, evaluate and train on; with several processes evaluate in a wrong order too."""
    from mindspeed.train.model import unwrap
    from mindspeed.train.trainer import Trainer

    found = {}
    for name, options in runs.items():
        with Trainer(config(options), Documents()) as trainer:
            trainer.num_microbatches = int(name)
            for chunk in map(unwrap, trainer.chunks):
                chunk.config.end_of_document = END
                chunk.config.microbatch_group_size_per_vp_stage = 3
                if world_size == 1:
                    chunk.register_forward_pre_hook(
                        lambda _, args: (args[0], args[1], mask_of(args[0]))
                    )
            steps, right = [trainer.train_step()], trainer.evaluate(1)
            if world_size > 1:
                with FIRST.applied():
                    found[f"{name} in a wrong order"] = trainer.evaluate(1) / right
            steps.append(trainer.train_step())
            found[name] = [right, *(x for step in steps for x in (step.loss, step.grad_norm))]
    return found, exchanged(rank) if world_size > 1 else None


def exchanged(rank):
    """Return what stages find, and how they differ under a mutation; and what is refused."""
    import torch.distributed as dist

    from mindspeed.features.context import stages

    models = [
        SimpleNamespace(pp_group=dist.new_group(), config=SimpleNamespace(end_of_document=END))
        for _ in range(2)
    ]

    def schedule(*, model, first, runs):
        for index in range(runs):
            for chunk in model:
                starts = stages.shared(chunk, lambda i=index: torch.arange(first + i, 100))
                found.append(int(starts[0]))
                assert len(starts) == 100 - starts[0]
        if runs < 3:
            raise InterruptedError

    def after_failure(model, first):
        with suppress(InterruptedError):
            run(model=chunks[model], first=first, runs=2 - (rank > 1))
        found.clear()
        run(model=chunks[model], first=first + 10, runs=3)
        return list(found)

    run, found = stages.passing(schedule), []
    chunks = [[m, SimpleNamespace(**vars(m))] for m in models]
    results = [after_failure(0, 0), after_failure(1, 30), after_failure(0, 60)]
    with STALE.applied():
        stale = after_failure(1, 70)
    link = stages._LINKS[models[0].pp_group.group_name]
    sent = [sum(part.nbytes for part, _ in messages) for messages in link._sent]
    link._passes += 2**12 * (rank == 0)  # The next tags are those of this pass.
    said = []
    for call in (
        lambda: stages.shared(models[0], None),
        lambda: run(model=chunks[0], first=0, runs=3),
    ):
        with suppress(RuntimeError) if rank == 0 else pytest.raises(RuntimeError) as error:
            call()
        said.append("" if rank == 0 else str(error.value))
    return results, stale, said, sent


@pytest.mark.megatron014
def test_every_stage_knows_the_documents_of_its_micro_batch():
    ranks = run_ranks(losses, 4, DIVIDED, timeout=180, preload="megatron")
    (alone,) = run_ranks(losses, 1, ALONE, preload="megatron")
    for found, _ in ranks:
        for name in ALONE:
            assert found[name] == pytest.approx(alone[0][name], rel=3e-6), name
            assert found[f"{name} in a wrong order"] != pytest.approx(1, rel=1e-4), name
    # To three stages: 64 integers, and what of 3 and the starts does not fit.
    starts = [100, 99, 90, 89, 88, 40, 39, 30, 29, 28]
    sizes = [3 * 8 * max(64, 3 + count) for count in starts]
    for rank, (_, (results, stale, said, sent)) in enumerate(ranks):
        assert sent == (sizes if rank == 0 else [])
        assert results == [[i, i, i + 1, i + 1, i + 2, i + 2] for i in (10, 40, 70)]
        assert rank < 2 or stale != [80, 80, 81, 81, 82, 82]
        assert rank == 0 or "one of Megatron's schedules" in said[0]
        assert rank == 0 or "have not run the same schedules" in said[1]
