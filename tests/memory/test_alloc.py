"""What is said about a device's allocator, and pools where a device has them."""

import contextlib
import re
from types import SimpleNamespace

import pytest
import torch

from ms_memory import alloc


def device(allocated, reserved, retries):
    """A device's module of torch that counted something."""
    return SimpleNamespace(
        memory_stats=lambda: {"num_alloc_retries": retries},
        max_memory_allocated=lambda: allocated,
        max_memory_reserved=lambda: reserved,
    )


@pytest.mark.parametrize(
    ("kind", "counted", "words"),
    [
        ("npu", (90, 100, 0), "10 idle, with 0 retries: nothing to set"),
        ("npu", (89, 100, 0), "PYTORCH_NPU_ALLOC_CONF=expandable_segments:True"),
        ("cuda", (100, 100, 2), "2 retries: start with PYTORCH_CUDA_ALLOC_CONF="),
        ("xpu", (1, 100, 0), "99 idle, .* PYTORCH_ALLOC_CONF=expandable_segments:True"),
    ],
)
def test_recommendation(kind, counted, words):
    assert re.search(words, alloc.recommend(alloc.read(kind, device(*counted))))


def test_the_processor_has_nothing_to_set():
    assert alloc.read("cpu") is None
    assert "nothing to set" in alloc.recommend(None)
    with alloc.pool("cpu") as pool:
        assert pool is None
        assert torch.ones(2).sum() == 2


def test_pool():
    inside = []

    @contextlib.contextmanager
    def use(pool):
        inside.append(pool)
        yield
        inside.append(None)

    class MemPool:
        pass

    with alloc.pool("npu", SimpleNamespace(MemPool=MemPool, use_mem_pool=use)) as pool:
        assert isinstance(pool, MemPool)
        assert inside == [pool]
    assert inside == [pool, None]
