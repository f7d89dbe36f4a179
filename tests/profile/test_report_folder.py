"""Folders of profiles: which files belong to one, what they add up to, and what changed."""

import json
import os

import pytest

from ms_profile import report
from ms_profile.report.folder import find
from support.mutation import Mutation, assert_caught
from support.traces import comm_record, flops_record, gpu_trace, memory_record, write_trace

US = pytest.approx


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "run" / "profile"
    root.mkdir(parents=True)
    for rank in (0, 1):
        write_trace(root / f"rank{rank}_steps10-12.pt.trace.json.gz", gpu_trace(rank))
        records = {
            "comm": comm_record(rank),
            "memory": memory_record(rank),
            "flops": flops_record(),
        }
        for kind, record in records.items():
            (root / f"rank{rank}.{kind}.json").write_text(json.dumps(record))
    return root


def test_a_folder_in_a_run(folder):
    (folder.parent / "config.json").write_text("{}")
    found = report.summarise(folder.parent)
    assert found.path == str(folder)
    assert [rank.rank for rank in found.ranks] == [0, 1]
    assert (found.world_size, found.missing, found.problems, found.notes) == (2, (), (), ())
    first = found.ranks[0]
    (comm,) = first.comm_bytes
    assert (comm.group, comm.op, comm.calls, comm.bytes, comm.wire_bytes) == (
        "dp",
        "all_reduce",
        3,
        48,
        24,
    )
    assert (first.memory.bytes, first.memory.module) == (96, "mlp")
    assert first.flops["mlp"] == {"forward": 100, "backward": 200}
    assert json.loads(json.dumps(found.as_dict()))["ranks"][1]["kinds"]["compute_s"] == US(660e-6)


def test_spread_over_ranks(folder):
    from ms_profile.report.summary import over_ranks

    spread = over_ranks(report.summarise(folder))["compute_s"]
    assert spread.rank == 1
    figures = (spread.median, spread.slowest, spread.spread)
    assert [round(figure * 1e6) for figure in figures] == [630, 660, 60]


def test_a_broken_file_does_not_hide_the_others(folder):
    broken = folder / "rank1_steps10-12.pt.trace.json.gz"
    broken.write_bytes(broken.read_bytes()[:-30])
    (folder / "rank0.memory.json").write_text("[]")
    found = report.summarise(folder)
    assert [rank.rank for rank in found.ranks] == [0, 1]
    assert found.missing == (0, 1)
    assert len(found.problems) == 2
    assert found.problems[0].startswith(str(folder / "rank0.memory.json"))
    assert "is cut" in found.problems[1]
    assert found.ranks[0].kinds is not None
    assert found.ranks[1].kinds is None
    assert found.ranks[1].comm_bytes


def test_nothing_but_broken_files_is_an_error(tmp_path):
    (tmp_path / "rank3_steps1-2.pt.trace.json").write_text('{"traceEvents": [')
    with pytest.raises(report.TraceError, match=r"rank3_steps1-2.*is cut"):
        report.summarise(tmp_path)


def test_of_two_results_of_one_name_the_newer_is_read(folder):
    old = folder / "rank0_steps10-12.pt.trace.json.gz"
    write_trace(folder / "rank0_steps10-12.1.pt.trace.json", gpu_trace(rank=1))
    write_trace(folder / "rank0_steps10-12.pt.trace.json", gpu_trace(rank=1))
    found = report.summarise(folder)
    assert found.ranks[0].kinds.compute_s == US(660e-6)
    assert len(found.notes) == 2
    assert any(old.name in note for note in found.notes)
    assert found.problems == ()


def test_windows_of_one_rank_add_up(folder):
    write_trace(folder / "rank0_steps20-22.pt.trace.json", gpu_trace(steps=(20, 21)))
    first = report.summarise(folder).ranks[0]
    assert first.steps == 4
    assert first.kinds.compute_s == US(1200e-6)
    assert {row.name: row.calls for row in first.operators}["sgemm_128"] == 12
    assert first.comm_times[0].calls == 4
    assert first.comm_times[0].bytes == 4 * 4096


def check_links(folder):
    """A link in the folder, and one to a folder, lead nowhere."""
    elsewhere = folder.parent.parent / "away"
    elsewhere.mkdir(exist_ok=True)
    write_trace(elsewhere / "rank7_steps1-2.pt.trace.json", gpu_trace())
    link = folder / "rank5_steps10-12.pt.trace.json"
    for path, target in (
        (link, elsewhere / "rank7_steps1-2.pt.trace.json"),
        (folder.parent / "more", elsewhere),
    ):
        path.unlink(missing_ok=True)
        path.symlink_to(target)
    found = report.summarise(folder.parent)
    assert [rank.rank for rank in found.ranks] == [0, 1]
    assert found.missing == (5,)
    assert found.problems == (f"{link}: is a symbolic link, which is not followed",)


def test_links_are_not_followed(folder):
    check_links(folder)


def test_a_followed_link_is_noticed(folder):
    mutation = Mutation("follows", "ms_profile.report.stream:_open", "os.O_NOFOLLOW", "0")
    assert_caught(mutation, lambda: check_links(folder))


def test_folders_that_are_none(tmp_path):
    (tmp_path / "file").write_text("")
    for name, fault in (
        ("nowhere", "no such folder"),
        (".", "holds no profile"),
        ("file", "is not a folder"),
    ):
        with pytest.raises(report.TraceError, match=fault):
            find(tmp_path / name)


def test_several_profiles_are_named(folder):
    other = folder.parent / "later"
    other.mkdir()
    write_trace(other / "rank0_steps1-2.pt.trace.json", gpu_trace())
    with pytest.raises(report.TraceError, match=r"holds 2 profiles, name one, .*: later, profile"):
        find(folder.parent)
    assert find(other).path == other


def test_a_device_file_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "rank0_steps1-2.pt.trace.json")
    with pytest.raises(report.TraceError, match="is not a regular file"):
        report.summarise(tmp_path)


def test_changes_between_runs(folder, tmp_path):
    before = report.summarise(folder)
    other = tmp_path / "other"
    other.mkdir()
    trace = gpu_trace()
    for event in trace["traceEvents"]:
        if event["name"] == "sgemm_128":
            event.update(name="sgemm_256", dur=50)
    write_trace(other / "rank0_steps10-12.pt.trace.json", trace)
    record = comm_record(0)
    record["calls"].pop()
    (other / "rank0.comm.json").write_text(json.dumps(record))
    (other / "rank0.flops.json").write_text(json.dumps(flops_record()))
    found = report.compare(before, report.summarise(other))
    operators = {change.name: change for change in found.operators}
    assert operators["sgemm_128"].state == "gone"
    assert operators["sgemm_256"].state == "new"
    assert operators["sgemm_256"].after * 1e6 == US(150)  # per step
    assert operators["sgemm_128"].before * 1e6 == US(315)  # mean of the ranks
    assert found.operators[0].name == "sgemm_128"
    (wire,) = found.communication
    assert (wire.name, wire.before, wire.after) == ("dp all_reduce", 48, 16)
    assert {change.name: change.difference for change in found.flops} == {"mlp": -300, "": -1}
    assert found.notes == (f"memory: only {folder} has it",)
    assert json.loads(json.dumps(found.as_dict()))["kind"] == "comparison"


SUMMARY = {
    "kind": "summary",
    "version": 1,
    "rank": 0,
    "world_size": 4,
    "steps": [10, 11],
    "seconds": [0.5, 0.25],
    "operators": [
        {"name": "aten::mm", "calls": 2, "self_us": 5.0, "total_us": 7.0, "shapes": [[1]]},
        {"name": "aten::mm", "calls": 1, "self_us": 2.0, "total_us": 3.0, "shapes": [[2]]},
        {"name": "sgemm", "calls": 3, "device_self_us": 9.0, "device_total_us": 9.0},
        {"name": "ProfilerStep#10", "calls": 1, "self_us": 1.0, "total_us": 9.0, "mark": True},
        {"name": "train.py(7): step", "calls": 1, "self_us": 1.0, "total_us": 9.0},
    ],
}


def test_a_summary_stands_in_for_a_trace(tmp_path):
    (tmp_path / "rank0_steps10-12.summary.json").write_text(json.dumps(SUMMARY))
    found = report.summarise(tmp_path)
    (rank,) = found.ranks
    assert (found.world_size, rank.iterations, rank.step_s) == (4, (10, 11), 0.375)
    assert [(row.name, row.where, row.calls) for row in rank.operators] == [
        ("sgemm", "device", 3),
        ("aten::mm", "host", 3),
    ]
    assert rank.operators[1].self_s == US(7e-6)
    # Also where the trace is larger than the limit.
    write_trace(tmp_path / "rank0_steps10-12.pt.trace.json", gpu_trace())
    assert report.summarise(tmp_path).ranks[0].kinds is not None
    refused = report.summarise(tmp_path, report.Limits(trace_bytes=100))
    assert refused.missing == (0,)
    assert refused.ranks == found.ranks


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"kind": "comm"}, "got kind 'comm', version 1"),
        ({"rank": 1}, "is a summary of rank 1"),
        ({"steps": [1]}, "1 steps have 2 times"),
        ({"seconds": [-1, 1]}, "seconds is -1, outside"),
        ({"operators": 3}, "operators is a int, not a list"),
        ({"operators": [[]]}, r"operators\[0\] is not an object with a name"),
        ({"operators": [{"name": "a", "calls": -1}]}, r"operators\[0\].calls is -1"),
        ({"operators": [{"name": "a", "calls": 1, "self_us": 1e99}]}, r"self_us is 1e\+99"),
    ],
)
def test_faults_of_a_summary(tmp_path, change, fault):
    path = tmp_path / "rank0_steps10-12.summary.json"
    path.write_text(json.dumps({**SUMMARY, **change}))
    with pytest.raises(report.TraceError, match=fault):
        report.summarise(tmp_path)


def test_a_meter_is_saved_where_the_reader_looks(tmp_path):
    folder = tmp_path / "new" / "profile"
    assert report.save(comm_record(1), folder).name == "rank1.comm.json"
    bare = {name: value for name, value in memory_record().items() if name != "rank"}
    assert report.save(bare, folder, rank=2).name == "rank2.memory.json"
    assert report.save(flops_record(), folder).name == "rank0.flops.json"
    found = report.summarise(tmp_path)
    assert [rank.rank for rank in found.ranks] == [0, 1, 2]
    assert found.ranks[2].memory.bytes == 96
    # The first file stays, and the second is the newer one.
    assert report.save({**flops_record(), "by_module": {}}, folder).name == "rank0.flops.1.json"
    assert report.summarise(tmp_path).ranks[0].flops == {}
    with pytest.raises(ValueError, match="no kind of record is named 'steps'"):
        report.save({"kind": "steps"}, folder)
    with pytest.raises(TypeError, match="a meter or its as_dict"):
        report.save([], folder)
    with pytest.raises(ValueError, match="the record is of rank 1, not of rank 0"):
        report.save(comm_record(1), folder, rank=0)
    with pytest.raises(ValueError, match="rank is -1"):
        report.save(flops_record(), folder, rank=-1)


def test_public_names():
    assert {"summarise", "compare", "save", "TraceError"} <= set(report.__all__)
    assert all(getattr(report, name).__doc__ for name in report.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        report.nothing  # noqa: B018
