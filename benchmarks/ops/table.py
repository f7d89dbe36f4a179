"""Write the table of operators in docs/ops/index.md from self-tests and benchmark results."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from ms_ops import registry, testing

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "ops" / "index.md"
BEGIN, END = "<!-- operators: begin -->", "<!-- operators: end -->"
HEADER = "| operator | samples | worst error in roundings | NPU calls | against eager, CPU |"
# Backend -> options of the self-test and its environment.
RUNS = {
    "portable": ([], {}),
    "reference": ([], {}),
    "npu": (["--emulated"], {}),
    "triton": (["--device", "cpu"], {"TRITON_INTERPRET": "1"}),
}


def selftest(backend):
    """Return the report of one backend, None when it cannot run here."""
    options, environment = RUNS[backend]
    command = [sys.executable, "-m", "ms_ops.selftest", "--backend", backend, *options]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, **environment}
    )
    if done.returncode == 2:
        print(f"{backend}: {done.stderr.strip()}", file=sys.stderr)
        return None
    report = json.loads(done.stdout)
    if report["failures"]:
        failed = {op: r["failures"] for op, r in report["operators"].items() if r["failures"]}
        sys.exit(f"{backend}: {json.dumps(failed, indent=2)}")
    return report["operators"]


def ratios(op):
    """Return the ratios to eager torch that the checked-in results of an operator hold."""
    path = HERE / "results" / f"{op}.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    found = [row["times_as_fast_as"]["eager"] for row in rows if "eager" in str(row)]
    return f"{min(found):.2f} to {max(found):.2f}" if found else ""


def line(op, reports):
    """Return the row of one operator."""
    served = {name: r[op]["served"] for name, r in reports.items() if r and op in r}
    errors = {
        name: max(r[op]["roundings"].values(), default=0.0)
        for name, r in reports.items()
        if r and op in r and r[op]["served"]
    }
    worst = ", ".join(f"{name} {value:.2g}" for name, value in errors.items())
    npu = "emulated, wheel" if "npu" in registry.backends(op) else "composition"
    return f"| `{op}` | {max(served.values(), default=0)} | {worst} | {npu} | {ratios(op)} |"


def table():
    """Return the whole table."""
    reports = {name: selftest(name) for name in RUNS}
    rows = [line(op, reports) for op in sorted(testing.OPERATORS)]
    return "\n".join([HEADER, "| --- | --- | --- | --- | --- |", *rows])


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--no-write", action="store_true", help="print only")
    options = parser.parse_args()
    text = table()
    print(text)
    if not options.no_write:
        page = PAGE.read_text(encoding="utf-8")
        before, rest = page.split(BEGIN)
        _, after = rest.split(END)
        PAGE.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
