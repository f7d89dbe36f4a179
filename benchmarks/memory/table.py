"""Write the tables of docs/memory/index.md from the results beside this file."""

import argparse
import json
from pathlib import Path

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "memory" / "index.md"


def mib(nbytes):
    return f"{nbytes / (1 << 20):.1f}"


def percent(part, whole):
    return f"{100 * part / whole:.1f}%"


def rows(table):
    head, *body = table
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def heads(first, budgets):
    return [first, *(f"{mib(b['bytes'])} MiB" for b in budgets)]


def budgets(found):
    """Time and bytes of every contender at every budget, then the FLOPs that it adds."""
    given, plain = found["budgets"], found["unplanned"]
    names = list(given[0]["contenders"])

    def table(first, cell):
        body = []
        for name in names:
            entries = [budget["contenders"][name] for budget in given]
            body.append([name, *(cell(e) if e else "-" for e in entries)])
        return rows([heads(first, given), *body])

    size = found["model"]
    intro = (
        f"{size['parameters'] / 1e6:.1f} million parameters, {size['layers']} layers,"
        f" {size['sequence'] * size['batch']} tokens, fp32; unplanned {mib(plain['bytes'])} MiB,"
        f" compiled without a budget {mib(plain['compiled_bytes'])} MiB."
    )
    if found["rounds"]:
        env = found["environment"]
        intro += (
            f" {env['threads']} thread on {env['processor']}; the unplanned step takes"
            f" {plain['median_ms']:.0f} ms, compiled {plain['compiled_time']:.2f} of that; medians"
            f" of {found['rounds']} rounds."
        )
    times = table("time by that of the unplanned step (MiB measured)", _time)
    added = table("FLOPs added", lambda e: percent(e["flops_added"], plain["flops"]))
    return f"{intro}\n\n{times}\n\n{added}"


def _time(entry):
    time = "" if entry["time"] is None else f"{entry['time']:.2f} "
    return f"{time}({mib(entry['bytes'])})"


def swaps(found):
    """Virtual time that plans with and without swaps add."""
    given, whole = found["budgets"], found["unplanned_ns"]
    body = []
    for name in ("recompute only", "with swaps"):
        entries = [budget[name] for budget in given]
        body.append([f"{name}: added", *(percent(e["added_ns"], whole) for e in entries)])
        body.append(["as predicted", *(percent(e["predicted_ns"], whole) for e in entries)])
        body.append(["peak, MiB", *(mib(e["peak"]) for e in entries)])
    body.append(["on the host, MiB", *(mib(e["host"]) for e in entries)])
    least = {name: mib(n) for name, n in found["least_bytes"].items()}
    after = (
        f"Smallest budget with a plan: {least['recompute only']} MiB by recomputation alone,"
        f" {least['with swaps']} MiB with swaps."
    )
    return f"{rows([heads('', given), *body])}\n\n{after}"


def features(found):
    return rows(
        [["feature", "freed, by formula", "bytes counted"]]
        + [[r["feature"], r["formula"], f"{r['bytes']:,}"] for r in found["rows"]]
    )


def solver(found):
    wrong = found["certificate"]
    body = [
        [
            f"100 layers, {r['layers']}",
            "yes" if r["swaps"] else "no",
            str(r["in flight"]),
            f"{r['seconds']:.2f}",
            "yes" if r["proven"] else f"gap {r['gap']}",
        ]
        for r in found["time"]
    ]
    head = ["12 options a layer", "swaps", "in flight", "seconds", "proven"]
    said = (
        f"{wrong['instances']:,} random problems against all their plans:"
        f" {wrong['over budget']} over the budget, {wrong['not the best']} not the best,"
        f" {wrong['wrong refusal']} refused wrongly, {wrong['wrong minimum']} wrong minima."
    )
    return f"{said}\n\n{rows([head, *body])}"


def optimizer(found):
    names = list(found["rows"][0]["time_over_master"])
    body = [
        [
            row["tensors"],
            *(f"{row['time_over_master'][n]:.2f}" for n in names if n != "master"),
            *(f"{row['bytes_a_parameter_beside_weights'][n]:.1f}" for n in names[1:]),
            *(mib(row["more_bytes_in_a_step"][n]) for n in names[1:]),
        ]
        for row in found["rows"]
    ]
    head = ["tensors x elements", "time, RNA", "time, RNE", "state, packed", "state, masters"]
    head += ["MiB in a step, packed", "MiB in a step, masters"]
    return rows([head, *body])


# Block of the page -> result and what writes it.
BLOCKS = {
    "features": ("features", features),
    "budgets": ("budgets", budgets),
    "swaps": ("swaps", swaps),
    "solver": ("planner_solver", solver),
    "optimizer": ("packed_adamw", optimizer),
}


def filled(page):
    """Return the page with every block written anew from the results."""
    for block, (name, make) in BLOCKS.items():
        begin, end = (f"<!-- {block}: {edge} -->" for edge in ("begin", "end"))
        before, rest = page.split(begin)
        _, after = rest.split(end)
        found = json.loads((HERE / "results" / f"{name}.json").read_text())
        page = f"{before}{begin}\n{make(found)}\n{end}{after}"
    return page


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--no-write", action="store_true", help="print only")
    options, _ = parser.parse_known_args()  # those of the folder's benchmarks are not for it
    text = filled(PAGE.read_text(encoding="utf-8"))
    if options.no_write:
        print(text)
    else:
        PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
