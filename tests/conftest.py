"""Settings of the whole suite: one thread per process, groups and fork servers ended."""

import gc
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: xdist workers share the cores

import pytest
import torch

from support.forkserver import close_servers

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _no_process_group_left():
    """A test that leaves its default group would change the next one."""
    yield
    dist = torch.distributed
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
        pytest.fail("the test left a default process group")


def pytest_collection_finish():
    """Keep the garbage collector out of all that was imported: a third of the time of small tests.

    A million objects of torch and of pytest live as long as the process.
    """
    gc.collect()
    gc.freeze()


def pytest_sessionfinish():
    close_servers()
