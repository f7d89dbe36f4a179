"""Result folders of the NPU's profiler, with the documented names of files and columns."""

import json

import pytest

from ms_profile import report
from ms_profile.report.ascend import read_results


def npu_folder(tmp_path, **files):
    output = tmp_path / "host_1_2_ascend_pt" / "ASCEND_PROFILER_OUTPUT"
    output.mkdir(parents=True)
    (output.parent / "profiler_info_3.json").write_text("{}")
    for name, content in files.items():
        (output / (name.replace("__", "."))).write_text(content)
    return output.parent


STEP_TIMES = (
    "Device_id,Step,Computing,Communication(Not Overlapped),Overlapped,Communication,Free,Stage\n"
    "0,10,600.0,90.0,110.0,200.0,210.0,0\n0,11,400.0,10.0,0.0,10.0,90.0,0\n"
)
OPERATORS = (
    "Device_id,OP Type,Core Type,Count,Total Time(us),Min Time(us),Avg Time(us),Max Time(us)\n"
    "0,MatMulV2,AI_CORE,6,600.0,1,1,1\n0,Add,AI_VECTOR_CORE,2,400.5,1,1,1\n"
)
COLLECTIVES = {
    "step10": {
        "p2p": {},
        "collective": {
            "hcom_allReduce__618_0_1@10.0.0.1%dp_0": {
                "Communication Time Info": {"Elapse Time(ms)": 0.2, "Wait Time(ms)": 0.1}
            },
            "Total Op Info": {"Communication Time Info": {"Elapse Time(ms)": 0.2}},
        },
    }
}


def test_results_of_the_npu_profiler(tmp_path):
    npu_folder(
        tmp_path,
        step_trace_time__csv=STEP_TIMES,
        op_statistic__csv=OPERATORS,
        communication__json=json.dumps(COLLECTIVES),
    )
    (found,) = report.summarise(tmp_path).ranks
    assert (found.rank, found.steps, found.source) == (3, 2, "device")
    kinds = {name: round(value * 1e6) for name, value in vars(found.kinds).items()}
    assert kinds["total_s"] == 1400
    assert kinds["compute_s"] == 1000
    assert kinds["communication_s"] == 210
    assert kinds["exposed_communication_s"] == 100
    assert kinds["idle_s"] == 300
    assert [(row.name, row.calls) for row in found.operators] == [("MatMulV2", 6), ("Add", 2)]
    (comm,) = found.comm_times
    assert (comm.group, comm.op, comm.calls, comm.exposed_s) == (
        "10.0.0.1%dp_0",
        "all_reduce",
        1,
        None,
    )
    assert comm.time_s == pytest.approx(2e-4)


@pytest.mark.parametrize(
    ("files", "fault"),
    [
        ({}, "holds no results: has the profile been analysed"),
        ({"step_trace_time__csv": "a,b\n1,2\n"}, "has no column Computing"),
        ({"step_trace_time__csv": STEP_TIMES[:-40]}, "too few columns|Communication"),
        ({"step_trace_time__csv": STEP_TIMES.split("\n")[0]}, "has no row"),
        ({"step_trace_time__csv": STEP_TIMES.replace("600.0", "-1")}, "column Computing"),
        ({"step_trace_time__csv": STEP_TIMES.replace("600.0", "nan")}, "column Computing"),
        ({"op_statistic__csv": OPERATORS.replace("6,", "x,")}, "column Count"),
        ({"op_statistic__csv": OPERATORS + '"'}, "line"),
        ({"communication__json": '{"step": 3}'}, "holds a int where an object"),
        (
            {"communication__json": json.dumps(COLLECTIVES).replace("0.2", "null")},
            "Elapse Time.ms. is a NoneType",
        ),
    ],
)
def test_faults_of_npu_results(tmp_path, files, fault):
    folder = npu_folder(tmp_path, **files)
    with pytest.raises(report.TraceError, match=fault):
        read_results(folder, 3)
