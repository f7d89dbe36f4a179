"""Pictures of meters: what is drawn is what was counted."""

import gzip
import json
import re
import struct
import xml.etree.ElementTree as ElementTree

import pytest
import torch

from ms_profile import MemoryMeter, report
from ms_profile.report import pictures
from support.mutation import Mutation, assert_caught
from support.traces import comm_record, memory_record


def event_record(rank):
    events = [
        {"name": "aten.mm", "kind": "compute", "begin": 5.0, "end": 5.002, "module": "mlp"},
        {"name": "all_reduce", "kind": "comm", "begin": 5.001, "end": 5.004, "group": "dp"},
        {"name": "wait", "kind": "wait", "begin": 5.003, "end": 5.004, "index": 1},
        {"name": "step", "kind": "mark", "begin": 5.0, "end": 5.0},
    ]
    return {"kind": "events", "version": 1, "rank": rank, "events": events}


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are saved, to look into."""
    figures = []
    save = pictures._save

    def keep(figure, path):
        figures.append(figure)
        save(figure, path)

    monkeypatch.setattr(pictures, "_save", keep)
    return figures


def texts(path):
    root = ElementTree.parse(path).getroot()
    return [
        " ".join("".join(each.itertext()).split()) for each in root.iter() if "text" in each.tag
    ]


def test_the_curve_is_the_timeline_of_the_meter(tmp_path, drawn):
    model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.GELU(), torch.nn.Linear(32, 8))
    with MemoryMeter(model) as meter:
        loss = model(torch.randn(4, 8)).sum()
        meter.mark("forward")
        loss.backward()
    path = report.memory_curve(meter, tmp_path / "memory.svg")
    data = meter.as_dict()
    (axes,) = drawn[0].axes
    curve = axes.lines[0]
    live = [point[2] / 1024 for point in data["timeline"]]
    assert axes.get_ylabel() == "live memory (KiB)"
    assert curve.get_ydata() == pytest.approx(live)
    peak = axes.lines[1]
    assert peak.get_ydata()[0] * 1024 == data["peak"]["bytes"]
    label = peak.get_label()
    assert label.startswith(
        f"peak {data['peak']['bytes'] / 1024:.3g} KiB, {data['peak']['module']}"
    )
    assert data["peak"]["phase"] in label
    assert label in texts(path)
    assert "forward" in texts(path)


def test_two_runs_lie_over_each_other(tmp_path, drawn):
    other = memory_record()
    other["timeline"] = [[0, 7.0, 16], [1, 9.0, 48]]
    other["peak"] = {"bytes": 48}
    report.memory_curve({"eager": memory_record(), "packed": other}, tmp_path / "memory.png")
    (axes,) = drawn[0].axes
    assert axes.get_xlabel() == "time (s)"
    curves = [line for line in axes.lines if len(line.get_xdata()) > 1]
    assert [list(curve.get_xdata()) for curve in curves] == [[0, 0.5, 1], [0, 2]]
    labels = [text.get_text() for text in drawn[0].legends[0].get_texts()]
    assert labels == [
        "eager: peak 96 B, mlp, forward, aten.mm, at 0.5 s",
        "packed: peak 48 B, at 2 s",
    ]


def test_by_operators_the_curve_is_the_same_each_time(tmp_path, drawn):
    slower = memory_record()
    slower["timeline"] = [[index, 3 * at, live] for index, at, live in slower["timeline"]]
    first, second = (
        report.memory_curve(record, tmp_path / f"{name}.svg", by="operator").read_bytes()
        for name, record in (("a", memory_record()), ("b", slower))
    )
    assert first == second
    assert list(drawn[0].axes[0].lines[0].get_xdata()) == [0, 1, 2]
    assert drawn[0].axes[0].get_xlabel() == "operators run"
    with pytest.raises(ValueError, match="by must be 'time' or 'operator'"):
        report.memory_curve(slower, tmp_path / "c.svg", by="module")


def check_matrix(tmp_path, drawn):
    records = [comm_record(0, 3), comm_record(1, 3), comm_record(2, 3)]
    records[2]["calls"][0] = {**records[2]["calls"][0], "group": "tp", "to": {"0": 4096}}
    report.communication_matrix(records, tmp_path / "matrix.png")
    axes = drawn[-1].axes[0]
    assert axes.get_images()[0].get_array().tolist() == [
        [0, 24 / 1024, 24 / 1024],
        [24 / 1024, 0, 24 / 1024],
        [(16 + 4096) / 1024, 16 / 1024, 0],
    ]
    assert {text.get_text() for text in axes.texts} == {"24\nB", "16\nB", "4.02\nKiB"}
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("to rank", "from rank")
    report.communication_matrix(records, tmp_path / "group.svg", group="tp")
    assert drawn[-1].axes[0].get_images()[0].get_array().sum() == 4
    assert "group tp" in texts(tmp_path / "group.svg")


def test_the_matrix_has_every_byte(tmp_path, drawn):
    check_matrix(tmp_path, drawn)


def test_a_transposed_matrix_is_noticed(tmp_path, drawn):
    mutation = Mutation(
        "to and from exchanged",
        "ms_profile.report.meters:matrix",
        'cells[each["rank"]][int(peer)]',
        'cells[int(peer)][each["rank"]]',
    )
    assert_caught(mutation, lambda: check_matrix(tmp_path, drawn))


def test_many_ranks_have_no_numbers(tmp_path, drawn):
    report.communication_matrix([comm_record(rank, 20) for rank in range(20)], tmp_path / "m.png")
    assert not drawn[0].axes[0].texts


def test_the_timeline_has_a_row_a_kind_and_rank(tmp_path, drawn):
    report.timeline({rank: event_record(rank) for rank in (0, 1)}, tmp_path / "timeline.svg")
    axes = drawn[0].axes[0]
    rows = ["mark", "compute", "communication dp", "wait"]
    wanted = [f"rank {rank} {row}" for rank in (0, 1) for row in rows]
    assert [re.sub(" +", " ", label.get_text()) for label in axes.get_yticklabels()] == wanted
    assert axes.get_xlabel() == "time (ms)"
    bars = [path.get_extents().intervalx for c in axes.collections for path in c.get_paths()]
    assert [bar.tolist() for bar in bars[:3]] == [
        pytest.approx(each) for each in ([0, 2], [1, 4], [3, 4])
    ]


def test_a_picture_has_no_more_than_can_be_seen(tmp_path, drawn):
    record = event_record(0)
    event = record["events"][0]
    record["events"] = [
        {**event, "begin": i * 1e-6, "end": i * 1e-6 + 5e-7} for i in range(20_000) if i % 5000 > 9
    ]
    report.timeline(record, tmp_path / "timeline.svg")
    (bars,) = drawn[0].axes[0].collections
    spans = [path.get_extents().intervalx.tolist() for path in bars.get_paths()]
    assert spans == [pytest.approx([5 * i, 5 * i + 4.9895], abs=1e-4) for i in range(4)]
    assert (tmp_path / "timeline.svg").stat().st_size < 50_000
    record["events"] = [{**event, "kind": "comm", "group": str(i)} for i in range(300)]
    with pytest.raises(ValueError, match="300 rows do not fit in a picture of at most 256"):
        report.timeline(record, tmp_path / "rows.svg")
    assert report.timeline(record, tmp_path / "rows.json").exists()


def test_ranks_stand_on_one_clock(tmp_path, drawn):
    """A record that began 2 ms later, by the time of day, is drawn 2 ms later."""
    records = [{**event_record(rank), "start": 1e9 + 0.002 * rank} for rank in (0, 1)]
    report.timeline(records, tmp_path / "timeline.svg")
    bars = [
        path.get_extents().intervalx[0]
        for c in drawn[0].axes[0].collections
        for path in c.get_paths()
    ]
    assert bars == pytest.approx([0, 1, 3, 2, 3, 5], abs=1e-3)


@pytest.mark.parametrize("name", ["timeline.json", "timeline.json.gz"])
def test_the_timeline_as_a_chrome_trace(tmp_path, name):
    path = report.timeline([event_record(3)], tmp_path / name)
    content = path.read_bytes()
    events = json.loads(gzip.decompress(content) if name.endswith("gz") else content)["traceEvents"]
    spans = {event["name"]: event for event in events if event["ph"] == "X"}
    assert {name: (event["ts"], event["dur"]) for name, event in spans.items()} == {
        "aten.mm": (0, 2000),
        "all_reduce": (1000, 3000),
        "wait": (3000, 1000),
    }
    assert spans["all_reduce"]["args"] == {"group": "dp"}
    assert {event["pid"] for event in events} == {3}
    assert [event["args"]["name"] for event in events if event["name"] == "thread_name"] == [
        "mark",
        "compute",
        "comm dp",
        "wait",
    ]


def test_pictures_are_of_the_suffix_and_the_same_each_time(tmp_path):
    first, second = (
        report.communication_matrix([comm_record(0)], tmp_path / f"{name}.svg").read_bytes()
        for name in "ab"
    )
    assert first == second
    png = report.communication_matrix([comm_record(0)], tmp_path / "c.png").read_bytes()
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", png[16:24])
    assert min(width, height) > 300


@pytest.mark.parametrize(
    ("draw", "error", "fault"),
    [
        (
            lambda p: report.memory_curve(memory_record(), p / "m.pdf"),
            ValueError,
            "must end in .svg",
        ),
        (lambda p: report.timeline([event_record(0)], p / "m.gif"), ValueError, "or .json.gz"),
        (lambda p: report.timeline([], p / "m.svg"), ValueError, "no events record is given"),
        (lambda p: report.memory_curve({}, p / "m.svg"), ValueError, "one to four runs"),
        (
            lambda p: report.memory_curve({**memory_record(), "timeline": []}, p / "m.svg"),
            ValueError,
            "has no timeline",
        ),
        (
            lambda p: report.communication_matrix([comm_record(0), comm_record(0, 3)], p / "m.svg"),
            ValueError,
            "worlds of 2 and of 3 ranks",
        ),
        (
            lambda p: report.communication_matrix([comm_record(0)] * 2, p / "m.svg"),
            ValueError,
            "two records are of rank 0",
        ),
        (lambda p: report.memory_curve(comm_record(0), p / "m.svg"), ValueError, "kind 'memory'"),
        (lambda p: report.memory_curve(7, p / "m.svg"), TypeError, "a meter or its as_dict"),
    ],
)
def test_bad_input(tmp_path, draw, error, fault):
    with pytest.raises(error, match=fault):
        draw(tmp_path)
    assert not list(tmp_path.iterdir())


def test_names_are_no_formulas_and_no_control_characters(tmp_path):
    record = memory_record()
    record["peak"]["module"] = "$\\frac{broken$ \x1b[31m <b>"
    path = report.memory_curve(record, tmp_path / "memory.svg")
    assert any("$\\frac{broken$ \\x1b[31m <b>" in text for text in texts(path))
