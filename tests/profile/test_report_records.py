"""Records of meters in files are untrusted as well: a record or a stated error."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ms_profile import report
from ms_profile.report.meters import record
from ms_profile.report.stream import load_record
from support.traces import comm_record, flops_record, memory_record

FINITE = st.floats(allow_nan=False, allow_infinity=False)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | FINITE | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=12,
)
NUMBER = st.integers(-(10**30), 10**30) | st.floats() | JSON


@st.composite
def _changed(draw):
    """A record of a meter with one value in it replaced."""
    whole = draw(st.sampled_from([comm_record(0), memory_record(), flops_record(), _events()]))
    whole = json.loads(json.dumps(whole))
    place = whole
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = draw(st.sampled_from(keys))
        below = place[key]
        if not isinstance(below, (dict, list)) or not below or draw(st.booleans()):
            place[key] = draw(NUMBER)
            return whole
        place = below


def _events():
    event = {"name": "aten.mm", "kind": "compute", "begin": 0.0, "end": 1.0, "module": "mlp"}
    other = {**event, "name": "all_reduce", "kind": "comm", "group": "dp"}
    return {"kind": "events", "version": 1, "rank": 0, "events": [event, other]}


@given(_changed())
@settings(max_examples=40, deadline=10_000)
def test_a_changed_record_is_a_record_or_an_error(tmp_path_factory, changed):
    folder = tmp_path_factory.mktemp("records")
    for kind in ("comm", "memory", "flops", "events"):
        (folder / f"rank0.{kind}.json").write_text(json.dumps(changed))
    try:
        found, error = report.summarise(folder), None
    except report.TraceError as refused:
        error = refused
    if error is not None:
        assert "rank0." in str(error)
        return
    assert len(found.problems) == 3  # it is of one kind
    json.dumps(found.as_dict(), allow_nan=False)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"kind": "flops"}, "a record of kind 'comm' is needed, got kind 'flops'"),
        ({"version": 2}, "version 2 of a comm record is not known"),
        ({"world_size": 0}, "world_size is 0, outside"),
        ({"rank": 2}, "rank is 2, outside 0 to 1"),
        ({"calls": {}}, "calls is a dict, not a list"),
        ({"calls": [{"op": "send", "group": "g", "bytes": -1}]}, r"calls\[0\].bytes is -1"),
        (
            {"calls": [{"op": "x", "group": "g", "bytes": 1, "wire_bytes": 1, "to": {"9": 1}}]},
            "names '9', no rank of a world of 2",
        ),
    ],
)
def test_faults_of_a_record(change, fault):
    with pytest.raises(ValueError, match=fault):
        record({**comm_record(0), **change}, "comm")


def test_a_record_is_a_meter_or_its_dictionary():
    class Meter:
        def as_dict(self):
            return memory_record()

    assert record(Meter(), "memory")["peak"]["bytes"] == 96
    with pytest.raises(TypeError, match=r"a meter or its as_dict\(\) is needed, got list"):
        record([], "memory")


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"", "is cut"),
        (b'{"a":', "is cut"),
        (b"[1]", "holds a list where an object is needed"),
        (b"{nope}", "is not JSON"),
        (b"\xff", "is not UTF-8"),
        (b'{"a": Infinity}', "Infinity is not a number of JSON"),
        (b"[" * 200_000, "is nested too deeply"),
        (b'{"a": "' + b"x" * 500 + b'"}', "larger than the limit of 400 bytes"),
    ],
)
def test_faults_of_a_small_file(tmp_path, content, fault):
    path = tmp_path / "rank0.comm.json"
    path.write_bytes(content)
    limit = 400 if b"xxx" in content else 1 << 20
    with pytest.raises(report.TraceError, match=fault):
        load_record(path, limit)
