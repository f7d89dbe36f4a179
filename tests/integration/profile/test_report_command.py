"""`mindspeed profile` on what two ranks really recorded, and on files that are broken."""

import json
import re
import sys

import pytest
import torch
import torch.distributed as dist

import ms_profile
from mindspeed.cli import main
from ms_profile import report
from ms_profile.report.averages import read_averages
from support.ranks import run_ranks
from support.traces import flops_record, gpu_trace, write_trace


def train(rank, world_size, folder):
    """Two profiled steps of data-parallel training, then one that is metered."""
    group = dist.new_group(list(range(world_size)), group_desc="dp")
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.GELU(), torch.nn.Linear(16, 8))
    x = torch.randn(4, 8)

    def step():
        model(x).sum().backward()
        for parameter in model.parameters():
            dist.all_reduce(parameter.grad, group=group)

    with ms_profile.profile(2, 4, out=folder, level=1, memory=True) as profiler:
        for iteration in range(1, 5):
            profiler.step(iteration)
            step()
    meters = ms_profile.MemoryMeter(model), ms_profile.CommMeter(), ms_profile.FlopMeter()
    with meters[0], meters[1], meters[2]:
        step()
    with ms_profile.EventTrace() as trace:
        step()
    for meter in (*meters, trace):
        report.save(meter, folder, rank)


@pytest.fixture(scope="module")
def profiled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "first" / "profile"
    run_ranks(train, 2, str(folder))
    return folder


def run(capsys, *argv):
    try:
        status = main(["profile", *map(str, argv)])
    except SystemExit as stop:
        status = stop.code
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return status, captured.out, captured.err


def test_figures_are_those_of_key_averages_and_of_the_meters(profiled, capsys):
    status, out, _ = run(capsys, profiled.parent, "--json")
    assert status == 0
    data = json.loads(out)
    assert (data["world_size"], len(data["ranks"])) == (2, 2)
    for rank in data["ranks"]:
        number = rank["rank"]
        assert rank["iterations"] == [2, 3]
        averages = read_averages(profiled / f"rank{number}_steps2-4.summary.json", number)
        wanted = {row.name: row for row in averages.operators if row.name.startswith("aten::")}
        found = {row["name"]: row for row in rank["operators"] if row["name"].startswith("aten::")}
        assert set(found) == set(wanted)
        for name, row in found.items():
            assert row["calls"] == wanted[name].calls
            assert row["self_s"] == pytest.approx(wanted[name].self_s, abs=2e-8 * row["calls"])
            assert row["total_s"] == pytest.approx(wanted[name].total_s, abs=4e-9 * row["calls"])
        kinds = rank["kinds"]
        parts = ("compute_s", "exposed_communication_s", "exposed_copy_s", "idle_s")
        assert sum(kinds[part] for part in parts) == pytest.approx(kinds["total_s"])
        (comm,) = rank["comm_bytes"]
        gradients = 4 * (8 * 16 + 16 + 16 * 8 + 8)
        assert comm == {
            "group": "dp",
            "op": "all_reduce",
            "calls": 4,
            "bytes": gradients,
            "wire_bytes": gradients,  # twice (n-1)/n of the bytes, of two ranks
        }
        (times,) = rank["comm_times"]
        assert (times["group"], times["op"], times["calls"]) == ("dp", "all_reduce", 8)
        assert 0 < times["exposed_s"] <= times["time_s"]
        forward = 2 * 4 * 8 * 16 * 2
        assert sum(p.get("forward", 0) for p in rank["flops"].values()) == forward
        assert rank["memory"]["bytes"] > 0
        modules = {row["module"] for row in rank["modules"]}  # of the events: no stacks here
        assert {"Sequential.0", "Sequential.1", "Sequential.2"} <= modules


def test_tables_of_a_run(profiled, capsys):
    status, out, err = run(capsys, profiled, "--top", "3")
    assert (status, err) == (0, "")
    assert "median of 2 of 2 ranks" in out
    assert re.search(r"dp +│ all_reduce +│ +8 │", out)
    assert re.search(r"operators by self time on the host, 3 of \d+, all ranks", out)
    assert re.search(r"│ 1 +│ +2-3 │", out)
    assert "FLOPs by module, 2 of 2, all ranks" in out
    assert "modules by self time, 3 of" in out


def test_pictures_of_a_run(profiled, capsys, tmp_path):
    status, _, err = run(capsys, profiled, "--json", "--picture", tmp_path / "new" / "pictures")
    assert status == 0
    made = sorted(path.name for path in (tmp_path / "new" / "pictures").iterdir())
    assert made == ["communication.svg", "memory.svg", "timeline.json", "timeline.svg"]
    assert err.count("drawn: ") == 4


def test_two_runs_are_compared(profiled, capsys, tmp_path):
    write_trace(tmp_path / "rank0_steps1-3.pt.trace.json", gpu_trace())
    (tmp_path / "rank0.flops.json").write_text(json.dumps(flops_record()))
    status, out, _ = run(capsys, profiled, tmp_path, "--top", "100")
    assert status == 0
    assert re.search(r"sgemm_128 +│ +│ +300 us │ +300 us │ +new │", out)
    assert "gone" in out
    assert f"memory: only {profiled} has it" in out
    status, out, _ = run(capsys, profiled, tmp_path, "--json")
    changes = {row["name"]: row for row in json.loads(out)["flops"]}
    assert changes["mlp"] == {"name": "mlp", "before": None, "after": 300}


def test_a_broken_rank_is_named_and_the_other_shown(profiled, capsys, tmp_path):
    for path in profiled.glob("rank*trace.json"):
        content = path.read_bytes()
        (tmp_path / path.name).write_bytes(content[:5000] if "rank1" in path.name else content)
    status, out, err = run(capsys, tmp_path)
    assert status == 1
    assert "rank1_steps2-4.pt.trace.json: is cut" in err
    assert "incomplete: files of rank 1 could not be read" in out
    assert "aten::addmm" in out


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        (["{0}/nowhere"], "no such folder"),
        (["{0}"], "is not JSON"),
        (["{0}", "{0}", "{0}"], "one or two runs are looked at, got 3"),
        (["{0}", "--max-size", "0"], "is not a size"),
        (["{0}", "--max-size", "4X"], "is not a size"),
        (["{0}", "--max-size", "1k"], "larger than the limit of 1024 bytes"),
        (["{0}", "--top", "-3"], "is not a positive number"),
        ([], "required: RUN_DIR"),
    ],
)
def test_bad_input(tmp_path, capsys, arguments, fault):
    (tmp_path / "rank0_steps1-2.pt.trace.json").write_text("x" * 2000)
    status, out, err = run(capsys, *(each.format(tmp_path) for each in arguments))
    assert (status, out) == (2, "")
    assert fault in err


def test_names_in_files_cannot_steer_the_terminal(tmp_path, capsys):
    trace = gpu_trace()
    trace["traceEvents"][2]["name"] = "[bold]kernel[/bold] \x1b]0;title\x07"
    write_trace(tmp_path / "rank0_steps1-2.pt.trace.json", trace)
    _, out, _ = run(capsys, tmp_path)
    assert "[bold]kernel[/bold] \\x1b]0;title\\x07" in out
    assert "\x1b" not in out


def test_nothing_to_draw_is_said(tmp_path, capsys):
    write_trace(tmp_path / "rank0_steps1-2.pt.trace.json", gpu_trace())
    assert "time by module: not recorded" in run(capsys, tmp_path)[1]
    status, _, err = run(capsys, tmp_path, "--json", "--picture", tmp_path / "pictures")
    assert status == 2
    assert "nothing to draw" in err
    assert not (tmp_path / "pictures").exists()


def test_pictures_without_matplotlib(profiled, capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    status, _, err = run(capsys, profiled, "--json", "--picture", tmp_path / "pictures")
    assert status == 1
    assert "pictures need matplotlib: pip install 'ms-profile[report]'" in err


def test_a_larger_limit_can_be_set(tmp_path, capsys):
    write_trace(tmp_path / "rank0_steps1-2.pt.trace.json", gpu_trace())
    assert run(capsys, tmp_path, "--max-size", "2MiB")[0] == 0
    assert report.Limits().trace_bytes == 1 << 30
