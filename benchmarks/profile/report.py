"""Read a trace: seconds and memory against json.load and against HolisticTraceAnalysis.

HolisticTraceAnalysis (HTA) brings about 100 packages, so it may live in an environment of its own:

    python -m venv hta && hta/bin/pip install HolisticTraceAnalysis psutil
    python -m benchmarks profile/report --hta hta/bin/python

Correctness first: on a trace with kernels, both give the same times, whatever is compared after.
Each reader runs in its own process and is given its processor time, that of its children included,
which other work on the machine hardly disturbs; ratios are medians over rounds of all readers.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import ms_profile  # noqa: E402
from ms_profile.report.trace import read_trace  # noqa: E402
from support.traces import gpu_trace, host_event, write_trace  # noqa: E402

MEASURED = """
import json, os, sys
sys.path.insert(0, {source!r})
{imports}
def peak():
    # Unlike getrusage, this is of this program alone, not of what started it.
    return 1024 * next(int(l.split()[1]) for l in open("/proc/self/status") if "VmHWM" in l)
before, start = peak(), sum(os.times()[:4])
{statement}
seconds = sum(os.times()[:4]) - start
print("RESULT", json.dumps([seconds, peak() - before]))
"""
READERS = {
    "ms_profile": (
        "from pathlib import Path; from ms_profile.report.trace import read_trace",
        "read_trace(Path({path!r}), 0)",
    ),
    "json.load": ("", "json.load(open({path!r}, 'rb'))"),
}
HTA = (
    "from hta.trace_analysis import TraceAnalysis",
    "analysis = TraceAnalysis(trace_files={{0: {path!r}}}, trace_dir='/')\n"
    "analysis.get_temporal_breakdown(visualize=False)\n"
    "analysis.get_comm_comp_overlap(visualize=False)",
)
HTA_FIGURES = """
import json, sys
from importlib.metadata import version
from hta.trace_analysis import TraceAnalysis
files = {{0: {path!r}}}
analysis = TraceAnalysis(trace_files=files, trace_dir="/", include_last_profiler_step=True)
found = {{"version": version("HolisticTraceAnalysis")}}
try:
    row = analysis.get_temporal_breakdown(visualize=False).iloc[0]
    found |= {{n: float(row[n + "_time(us)"]) for n in ("compute", "non_compute")}}
    share = analysis.get_comm_comp_overlap(visualize=False)["comp_comm_overlap_pctg"]
    found["overlap_percent"] = float(share.iloc[0])
except Exception as error:
    found["error"] = f"{{type(error).__name__}}: {{error}}"
print("RESULT", json.dumps(found))
"""


def result(python, code):
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT"))
    return json.loads(line.removeprefix("RESULT"))


def figures(path):
    """Ours in the terms of HTA: microseconds, percent."""
    kinds = read_trace(path, 0).kinds
    bare = kinds.exposed_communication_s + kinds.exposed_copy_s
    hidden = kinds.communication_s - kinds.exposed_communication_s
    share = 100 * hidden / kinds.communication_s if kinds.communication_s else None
    return {
        "compute": round(kinds.compute_s * 1e6, 3),
        "non_compute": round(bare * 1e6, 3),
        "overlap_percent": share and round(share, 2),
    }


def gate(folder, hta):
    """Both readers on a trace of a GPU for two ranks, and on one of a CPU."""
    rows = []
    for rank in (0, 1):
        path = write_trace(folder / f"rank{rank}_steps10-12.pt.trace.json", gpu_trace(rank))
        ours = figures(path)
        theirs = result(hta, HTA_FIGURES.format(path=str(path)))
        for name, value in ours.items():
            assert abs(theirs[name] - value) < 0.01, (name, value, theirs[name])
        rows.append({"trace": f"kernels, rank {rank}", "ms_profile": ours, "hta": theirs})
    host = [host_event("aten::mm", 10, 5), host_event("ProfilerStep#1", 0, 20)]
    host[1]["cat"] = "user_annotation"
    path = write_trace(folder / "rank0_steps1-2.pt.trace.json", {"traceEvents": host})
    theirs = result(hta, HTA_FIGURES.format(path=str(path)))
    rows.append({"trace": "no kernels", "ms_profile": figures(path), "hta": theirs})
    return rows


def measure(folder, steps, rounds, hta):
    path = folder / "rank0_steps10-99.pt.trace.json"
    trace = gpu_trace(steps=tuple(range(10, 10 + steps)))
    write_trace(path, trace)
    readers = {name: (sys.executable, *parts) for name, parts in READERS.items()}
    if hta:
        readers["hta"] = (hta, *HTA)
    seconds = {name: [] for name in readers}
    grown = {name: [] for name in readers}
    for _ in range(rounds):
        for name, (python, imports, statement) in readers.items():
            code = MEASURED.format(
                source=str(ROOT / "packages/ms-profile/src"),
                imports=imports,
                statement=statement.format(path=str(path)),
            )
            took, bytes_ = result(python, code)
            seconds[name].append(took)
            grown[name].append(bytes_)
    pairs = {n: zip(t, seconds["ms_profile"], strict=True) for n, t in seconds.items()}
    return {
        "events": len(trace["traceEvents"]),
        "file_bytes": path.stat().st_size,
        "median_processor_s": {n: round(statistics.median(t), 3) for n, t in seconds.items()},
        "times_as_long": {
            n: round(statistics.median(a / b for a, b in pair), 2) for n, pair in pairs.items()
        },
        "memory_per_file_byte": {
            n: round(statistics.median(g) / path.stat().st_size, 2) for n, g in grown.items()
        },
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hta", help="interpreter of an environment that has HTA")
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--write", action="store_true", help="into results/report.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        found = {
            "environment": {
                "ms_profile": ms_profile.__version__,
                "python": platform.python_version(),
                "machine": platform.machine(),
            },
            "rounds": options.rounds,
            "same_figures": gate(folder, options.hta) if options.hta else "HTA was not asked for",
            "reading": measure(folder, options.steps, options.rounds, options.hta),
        }
    text = json.dumps(found, indent=1)
    print(text)
    if options.write:
        (HERE / "results" / "report.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
