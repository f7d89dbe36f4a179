"""Files of a profile are untrusted: each fault has its error, and nothing else can happen."""

import gzip
import json
import time
import tracemalloc

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ms_profile import report
from ms_profile.report import stream
from ms_profile.report.meters import matrix
from ms_profile.report.stream import JsonStream, Limits, TraceEvents, printable
from ms_profile.report.trace import read_trace
from support.mutation import Mutation, assert_caught
from support.traces import comm_record, gpu_trace, write_trace

WHOLE = json.dumps(gpu_trace()).encode()
OP = {"ph": "X", "cat": "cpu_op", "name": "aten::mm", "pid": 1, "tid": 1, "ts": 1, "dur": 1}


def events(**changes):
    return json.dumps({"traceEvents": [OP | changes]}).encode()


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"", "is cut"),
        (b"   ", "is cut"),
        (WHOLE[:-1], "is cut"),
        (WHOLE[: len(WHOLE) // 2], "is cut"),
        (WHOLE[:-40] + "é".encode()[:1], "is cut inside a character"),
        (b"hello", "is not JSON: character 0 is 'h'"),
        (b"\x80\x81", "is not UTF-8"),
        (b'{"traceEvents": [nope]}', "is not JSON: Expecting value at character 17"),
        (b'{"traceEvents": [{}}', "is not JSON: character 19 is '}', not ',' or ']'"),
        (WHOLE + b"x", "more follows"),
        (b"17", "is not JSON: character 0 is '1', not '{'"),
        (b"{}", "it has no traceEvents"),
        (b'{"traceEvents": {}}', "traceEvents is not a list"),
        (b'{"traceEvents": [7]}', "event 0 is a int"),
        (b'{"traceEvents": [], "traceEvents": []}', "occurs twice"),
        (b'{"traceEvents": []}', "holds no operator"),
        (b'{"a": ' + b"[" * 100_000, "is nested too deeply"),
        (b'{"traceEvents": [{"ts": ' + b"1" * 5000 + b"}]}", "is not JSON"),
        (b'{"traceEvents": [{"ts": NaN}]}', "NaN is not a number of JSON"),
        (events(ts=-1), "event 0: ts is -1, outside 0 to"),
        (events(dur=-0.5), "event 0: dur is -0.5, outside"),
        (events(dur=1e300), "event 0: dur is 1e.300, outside"),
        (events(ts=10**400), "event 0: ts is a huge integer, outside"),
        (events(ts=True), "event 0: ts is a bool, not a number"),
        (events(ts="1"), "event 0: ts is a str, not a number"),
        (events(dur=None), "event 0: dur is a NoneType, not a number"),
        (
            events(ph="i", name="[memory]", args={"Total Allocated": 0.5}),
            "Total Allocated is 0.5, not an integer",
        ),
    ],
)
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_each_fault_of_a_trace_has_its_error(tmp_path, content, fault, suffix):
    path = tmp_path / f"rank0_steps1-2.pt.trace.json{suffix}"
    path.write_bytes(gzip.compress(content) if suffix else content)
    with pytest.raises(report.TraceError, match=fault) as caught:
        read_trace(path, 0)
    assert caught.value.path == path
    assert str(caught.value).startswith(str(path))
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"not packed at all", "is damaged: Not a gzipped file"),
        (gzip.compress(WHOLE)[:-20], "is cut: the compressed data end too early"),
        (gzip.compress(WHOLE)[:200] + b"\0" * 300, "is damaged|is cut"),
    ],
)
def test_damaged_packing(tmp_path, content, fault):
    path = tmp_path / "rank0_steps1-2.pt.trace.json.gz"
    path.write_bytes(content)
    with pytest.raises(report.TraceError, match=fault):
        read_trace(path, 0)


def check_bomb(tmp_path):
    """A file of 8 KB that unpacks to 8 MB of white space is given up at 1 MB."""
    path = tmp_path / "rank0_steps1-2.pt.trace.json.gz"
    path.write_bytes(gzip.compress(b" " * 8_000_000))
    tracemalloc.start()
    try:
        with pytest.raises(report.TraceError) as caught:
            read_trace(path, 0, Limits(trace_bytes=1_000_000))
        assert "is larger than the limit of 1000000 bytes" in str(caught.value)
        assert tracemalloc.get_traced_memory()[1] < 6_000_000
    finally:
        tracemalloc.stop()


def test_a_bomb_is_not_unpacked(tmp_path):
    check_bomb(tmp_path)


def test_a_limit_on_the_packed_size_alone_is_noticed(tmp_path):
    mutation = Mutation(
        "bomb goes off", "ms_profile.report.stream:read_chunks", "total > limit", "False"
    )
    assert_caught(mutation, lambda: check_bomb(tmp_path))


def test_limits(tmp_path):
    path = write_trace(tmp_path / "rank0_steps1-2.pt.trace.json", gpu_trace())
    size = path.stat().st_size
    assert read_trace(path, 0, Limits(trace_bytes=size)).steps == 2
    with pytest.raises(report.TraceError, match="larger than the limit"):
        read_trace(path, 0, Limits(trace_bytes=size - 1))
    count = len(gpu_trace()["traceEvents"])
    assert read_trace(path, 0, Limits(trace_events=count)).steps == 2
    with pytest.raises(report.TraceError, match=f"has more than {count - 1} events"):
        read_trace(path, 0, Limits(trace_events=count - 1))
    with pytest.raises(ValueError, match="limits must be positive"):
        Limits(trace_bytes=0)


def test_memory_does_not_grow_with_a_trace_of_unknown_events(tmp_path):
    path = tmp_path / "trace.json"
    other = json.dumps({"ph": "M", "name": "x" * 1000}).encode()
    path.write_bytes(b'{"traceEvents": [' + other + (b"," + other) * 20_000 + b"]}")
    assert path.stat().st_size > 20_000_000
    tracemalloc.start()
    try:
        assert sum(1 for _ in TraceEvents(path, 1 << 30)) == 20_001
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()


def test_many_groups_take_no_more_than_linear_time(tmp_path):
    """Each of 3000 groups is under way all the time, beside 3000 computations."""
    notes = {"ph": "X", "cat": "kernel", "pid": 0}
    compute = [{**notes, "name": "mm", "tid": 1, "ts": 2 * i, "dur": 1} for i in range(3000)]
    comm = [
        {**notes, "name": "nccl", "tid": 2, "ts": 0, "dur": 6000}
        | {"args": {"Collective name": "send", "Process Group Name": str(i)}}
        for i in range(3000)
    ]
    path = write_trace(tmp_path / "rank0_steps1-2.pt.trace.json", compute + comm)
    begin = time.process_time()
    found = read_trace(path, 0)
    assert time.process_time() - begin < 3  # 9 million steps would take longer
    assert len(found.comm_times) == 3000
    assert {round(row.exposed_s * 1e6) for row in found.comm_times} == {3000}


def test_a_matrix_of_a_huge_world_is_refused():
    record = {**comm_record(0), "world_size": 1 << 23}
    with pytest.raises(ValueError, match="at most 2048 ranks, got a world of 8388608"):
        matrix([record])


def test_one_value_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "VALUE_CHARACTERS", 5000)
    monkeypatch.setattr(stream, "CHUNK", 1000)
    path = tmp_path / "trace.json"
    path.write_bytes(b'{"traceEvents": [{"a": "' + b"x" * 100_000 + b'"}]}')
    with pytest.raises(report.TraceError, match="is not JSON"):
        list(TraceEvents(path, 1 << 30))


FINITE = st.floats(allow_nan=False, allow_infinity=False)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | FINITE | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=12,
)


@given(st.lists(JSON, max_size=6), st.integers(1, 9), st.booleans())
@settings(max_examples=40, deadline=10_000)
def test_pieces_of_any_size_give_the_same_values(tmp_path_factory, values, size, ascii_only):
    path = tmp_path_factory.mktemp("pieces") / "values.json"
    path.write_text(json.dumps(values, ensure_ascii=ascii_only, indent=1), encoding="utf-8")
    usual = stream.CHUNK
    stream.CHUNK = size
    try:
        found = JsonStream(path, 1 << 30)
        assert list(found.items()) == values
        found.close()
    finally:
        stream.CHUNK = usual


# What the reader looks at, with values that it must survive.
NUMBER = st.integers(-(10**30), 10**30) | st.floats() | JSON
NAMES = st.sampled_from(["aten::mm", "ProfilerStep#1", "[memory]", "gloo:send", "\x1b[31m"])
KINDS = st.sampled_from(["cpu_op", "kernel", "gpu_memcpy", "user_annotation", "python_function"])
EVENT = st.fixed_dictionaries(
    {},
    optional={
        "ph": st.sampled_from(["X", "i", "M"]) | JSON,
        "cat": KINDS | JSON,
        "name": NAMES | st.just("nn.Module: A_0") | JSON,
        "ts": NUMBER,
        "dur": NUMBER,
        "pid": JSON,
        "tid": JSON,
        "args": st.dictionaries(st.sampled_from(["Total Allocated", "dtype", "bytes"]), NUMBER)
        | JSON,
    },
)
SANE = st.fixed_dictionaries(
    {
        "ph": st.just("X"),
        "cat": KINDS,
        "name": NAMES,
        "ts": st.integers(0, 20),
        "dur": st.integers(0, 20),
    }
)


def attempt(function, *args):
    """What it returns, and the error it raises in its place."""
    try:
        return function(*args), None
    except report.TraceError as error:
        return None, error


def survives(path, content):
    path.write_bytes(content)
    found, error = attempt(read_trace, path, 0, Limits(trace_bytes=1 << 20))
    if error is not None:
        assert str(path) in str(error)
        assert str(error).isprintable()
        return
    kinds = found.kinds
    parts = kinds.compute_s + kinds.exposed_communication_s + kinds.exposed_copy_s
    assert parts + kinds.idle_s == pytest.approx(kinds.total_s)
    assert min(vars(kinds).values()) >= 0


@given(st.binary(max_size=300))
@settings(max_examples=40, deadline=10_000)
@example(b"\xef\xbb\xbf[]")
def test_arbitrary_bytes_are_a_trace_or_a_trace_error(tmp_path_factory, content):
    folder = tmp_path_factory.getbasetemp()
    survives(folder / "any.json", content)
    survives(folder / "any.json.gz", content)
    survives(folder / "packed.json.gz", gzip.compress(content))


@given(st.lists(EVENT | SANE | JSON, max_size=6) | JSON, st.dictionaries(st.text(), JSON))
@settings(max_examples=40, deadline=10_000)
def test_arbitrary_json_is_a_trace_or_a_trace_error(tmp_path_factory, found, header):
    folder = tmp_path_factory.getbasetemp()
    survives(folder / "any.json", json.dumps({**header, "traceEvents": found}).encode())
    survives(folder / "any.json", json.dumps(found).encode())


@given(st.lists(SANE, min_size=1, max_size=12))
@settings(max_examples=40, deadline=10_000)
def test_times_of_any_events_add_up(tmp_path_factory, found):
    survives(tmp_path_factory.getbasetemp() / "any.json", json.dumps(found).encode())


def test_text_for_a_terminal():
    assert printable("a\x1b[31m\n\t\u202e") == "a\\x1b[31m\\n\\t\\u202e"
    assert printable("plain é 中") == "plain é 中"
    assert len(printable("x" * 1000)) <= 200
    assert printable("\ud800") == "\\ud800"


def test_a_name_with_control_characters_is_shown_escaped(tmp_path):
    path = tmp_path / "rank0_steps1-2.pt.trace.json"
    path.write_bytes(b"\x1b[31m")
    with pytest.raises(report.TraceError) as caught:
        read_trace(path, 0)
    assert "\x1b" not in str(caught.value)
