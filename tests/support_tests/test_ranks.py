"""run_ranks: values, and what a reader sees when a rank fails, hangs, dies or misbehaves."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass

import psutil
import pytest
import torch
import torch.distributed as dist

from support.forkserver import close_servers, server
from support.mutation import Mutation
from support.ranks import PRELOADS, RankError, fault_point, rank_outcomes, run_ranks


@dataclass(frozen=True)
class Shape:
    """An argument whose class lives in this test file."""

    size: int


def sum_of_ranks(rank, world_size, shape):
    x = torch.full((shape.size,), float(rank))
    dist.all_reduce(x)
    return {"rank": rank, "sum": x, "shape": shape}


def fails_on(rank, world_size, bad):
    if rank == bad:
        raise ValueError(f"rank {rank} does not like this")
    dist.barrier()


def hangs_on(rank, world_size, bad):
    if rank == bad:
        time.sleep(600)
    dist.barrier()


def steps(rank, world_size, count):
    done = 0
    for step in range(count):
        fault_point(step)
        dist.all_reduce(torch.ones(1))
        done += 1
    return done


def exits_silently(rank, world_size):
    print(f"rank {rank} says goodbye")
    sys.stdout.flush()
    os._exit(7)


def finds_surroundings(rank, world_size):
    return {
        "cwd": os.getcwd(),
        "value": os.environ.get("MS_TEST_VALUE"),
        "threads": torch.get_num_threads(),
        "rank": os.environ["RANK"],
        "draw": torch.rand(1).item(),
        "megatron": sorted(m for m in sys.modules if m.split(".")[0] == "megatron"),
        "name": __name__,
    }


def doubled(value):
    return value * 2


def returns_doubled(rank, world_size, value):
    return doubled(value)


def processor_seconds(rank, world_size):
    dist.all_reduce(torch.ones(1))
    return time.process_time()


def without_group(rank, world_size):
    return rank, dist.is_initialized()


def finishes_at_own_pace(rank, world_size):
    if rank == 0:
        dist.send(torch.arange(4.0), 1)
        return None
    time.sleep(0.3)
    received = torch.empty(4)
    dist.recv(received, 0)
    return received.tolist()


def leaves_a_process(rank, world_size, ending, path):
    process = subprocess.Popen(["sleep", "600"])
    with open(path, "w") as file:
        file.write(str(process.pid))
    if ending == "raises":
        raise ValueError(ending)
    if ending == "dies":
        os.kill(os.getpid(), signal.SIGKILL)


def leaves_unpicklable(rank, world_size):
    return lambda: rank


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_results_by_rank(world_size):
    results = run_ranks(sum_of_ranks, world_size, Shape(3))
    assert [r["rank"] for r in results] == list(range(world_size))
    expected = float(sum(range(world_size)))
    assert all(r["sum"].tolist() == [expected] * 3 for r in results)
    assert all(r["shape"] == Shape(3) for r in results)


def test_ranks_import_nothing_again():
    """Their own processor seconds, which other load on the machine does not change much."""
    assert max(run_ranks(processor_seconds, 2)) < 0.5  # importing torch takes 1.5 s or more


@pytest.mark.parametrize("bad", [0, 1, 3])
def test_failing_rank_is_named_with_its_traceback(bad):
    start = time.monotonic()
    with pytest.raises(RankError) as caught:
        run_ranks(fails_on, 4, bad, timeout=30)
    message = str(caught.value)
    assert f"rank {bad} of 4 failed first (error)" in message
    assert f"ValueError: rank {bad} does not like this" in message
    assert "in fails_on" in message
    assert caught.value.first.rank == bad
    assert time.monotonic() - start < 15  # the others wait in a barrier and are not waited for


def test_hanging_rank_is_killed_and_its_stack_shown():
    start = time.monotonic()
    with pytest.raises(RankError) as caught:
        run_ranks(hangs_on, 2, 1, timeout=2)
    assert time.monotonic() - start < 10
    hung = caught.value.outcomes[1]
    assert hung.status == "timeout"
    assert "still running after 2 s" in hung.error
    assert "in hangs_on" in hung.detail


def test_killed_rank_is_seen_and_the_others_fail_instead_of_hanging():
    outcomes = rank_outcomes(steps, 3, 5, timeout=20, kill_at=(1, 2))
    assert [outcome.status for outcome in outcomes] == ["error", "killed", "error"]
    assert "SIGKILL" in outcomes[1].error
    assert all("closed" in o.error.lower() or "reset" in o.error.lower() for o in outcomes[::2])
    assert max(outcome.at for outcome in outcomes) < 15
    with pytest.raises(RankError, match="rank 1 of 3 failed first"):
        run_ranks(steps, 3, 5, timeout=20, kill_at=(1, 2))


def test_kill_at_a_step_never_reached_does_nothing():
    assert run_ranks(steps, 2, 3, kill_at=(1, 99)) == [3, 3]


def test_rank_that_exits_without_outcome():
    with pytest.raises(RankError, match="exit status 7") as caught:
        run_ranks(exits_silently, 1)
    assert "rank 0 says goodbye" in str(caught.value)


def test_surroundings(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MS_TEST_VALUE", "from the test")
    first, second = run_ranks(finds_surroundings, 2)
    assert first["cwd"] == os.getcwd()
    assert first["value"] == "from the test"
    assert (first["rank"], second["rank"]) == ("0", "1")
    assert first["threads"] == 1
    assert first["draw"] == second["draw"]  # the same seed
    assert first["megatron"] == []
    assert first["name"] == __name__
    assert run_ranks(finds_surroundings, 1, env={"MS_TEST_VALUE": "given"})[0]["value"] == "given"
    assert run_ranks(finds_surroundings, 1)[0]["draw"] == first["draw"]


def test_the_test_process_keeps_its_environment():
    before = dict(os.environ)
    run_ranks(sum_of_ranks, 2, Shape(1))
    assert dict(os.environ) == before
    assert not dist.is_initialized()


def test_no_group():
    assert run_ranks(without_group, 2, backend=None) == [(0, False), (1, False)]


def test_a_rank_that_is_done_waits_for_its_peers():
    assert run_ranks(finishes_at_own_pace, 2)[1] == [0.0, 1.0, 2.0, 3.0]


def test_result_that_cannot_be_pickled_is_an_error():
    with pytest.raises(RankError, match="pickle"):
        run_ranks(leaves_unpicklable, 1)


def test_local_function_is_refused():
    def inner(rank, world_size):
        return rank

    with pytest.raises(TypeError, match="module-level"):
        run_ranks(inner, 1)


def test_mutation_reaches_the_ranks_and_not_the_test_process():
    triple = Mutation("tripled", f"{__name__}:doubled", "* 2", "* 3")
    assert run_ranks(returns_doubled, 2, 5, mutate=[triple]) == [15, 15]
    assert doubled(5) == 10
    assert run_ranks(returns_doubled, 2, 5) == [10, 10]


def test_server_starts_again_after_it_was_closed():
    assert run_ranks(without_group, 1, backend=None) == [(0, False)]
    close_servers()
    assert run_ranks(without_group, 1, backend=None) == [(0, False)]


def test_no_rank_outlives_its_call():
    with pytest.raises(RankError):
        run_ranks(hangs_on, 2, 0, timeout=1)
    assert children_of(server(PRELOADS["torch"])._server.pid) == []


@pytest.mark.parametrize("ending", ["returns", "raises", "dies"])
def test_processes_of_a_rank_end_with_it(ending, tmp_path):
    with contextlib.suppress(RankError):
        run_ranks(leaves_a_process, 1, ending, str(tmp_path / "pid"))
    pid = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 5
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, f"process {pid} still runs"
        time.sleep(0.02)


def test_preload_that_fails_says_why():
    with pytest.raises(RuntimeError, match="no_such_module_here"):
        server(("no_such_module_here",))


def children_of(pid):
    return psutil.Process(pid).children(recursive=True)
