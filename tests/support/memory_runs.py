"""Short training runs that tell how memory features leave the numbers, for use inside a rank."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from typing import Any

SMALL = {
    "num_layers": 4,
    "hidden_size": 32,
    "ffn_hidden_size": 48,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "seq_length": 16,
    "vocab_size": 61,
    "make_vocab_size_divisible_by": 4,
    "micro_batch_size": 1,
    "global_batch_size": 2,
    "init_method_std": 0.2,
    "swiglu": True,
    "normalization": "RMSNorm",
    "add_bias_linear": False,
    "optimization_level": 2,
}


def config(options: Mapping[str, Any]) -> Any:
    """The small configuration with other options, flags of features among them."""
    from mindspeed.train.config import TrainConfig

    leaves = TrainConfig().flat()
    native = {name: value for name, value in options.items() if name in leaves}
    flags = tuple(sorted((k, v) for k, v in options.items() if k not in leaves))
    return TrainConfig.of(**{**SMALL, **native}, feature_flags=flags)


def digest(trainer: Any) -> str:
    """Tells whether two trainers hold the same parameters, bit for bit."""
    import torch

    found = hashlib.sha256()
    for parameter in trainer.parameters().values():
        found.update(parameter.contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def train(options: Mapping[str, Any], steps: int = 1, evaluate: bool = False) -> dict[str, Any]:
    """Train from the seed; losses, parameters afterwards, and what lay on the host."""
    from mindspeed.features.memory.session import open_sessions
    from mindspeed.train.trainer import Trainer

    numbers: list[float] = []
    with Trainer(config(options)) as trainer:
        # Chunks of a process share their memory on the host.
        hosts = {session.host.ledger for session in open_sessions()}
        left = 0
        for _ in range(steps):
            result = trainer.train_step()
            numbers += [result.loss, result.grad_norm]
            if evaluate:
                numbers.append(trainer.evaluate(1))
            left += sum(host.nbytes for host in hosts)
        return {
            "numbers": numbers,
            "parameters": digest(trainer),
            "moved": sum(host.total for host in hosts),
            "peak": sum(host.peak for host in hosts),
            "left": left,
        }


def schedules(options: Mapping[str, Any], names: Sequence[object]) -> list[dict[str, Any]]:
    """Train once for each schedule of the simulated device."""
    found = []
    for name in names:
        os.environ["MS_MEMORY_SIM"] = str(name)
        found.append(train(options))
    return found
