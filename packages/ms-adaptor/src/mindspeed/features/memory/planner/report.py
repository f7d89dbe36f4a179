"""What is said of memory plans: files beside a run, and lines that compare with measurements."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mindspeed.features.memory.planner.schedule import Planned


def save(plan: Mapping[str, Any], folder: Path, name: str) -> list[Path]:
    """Write a plan as JSON, and the memory over a step as PNG where matplotlib is installed.

    Args:
        plan: `Plan.as_dict()`.
        folder: is made.
        name: of the files, without an ending.

    Returns:
        What was written.
    """
    from ms_memory.planner import Plan, report

    folder.mkdir(parents=True, exist_ok=True)
    found = [folder / f"{name}.json"]
    found[0].write_text(json.dumps(plan, indent=1) + "\n")
    with contextlib.suppress(ImportError):
        found.append(report.picture(Plan.from_dict(plan), folder / f"{name}.png"))
    return found


def publish(made: Planned, arguments: Mapping[str, Any]) -> None:
    """Print a plan on the first rank of its stage, and save it beside a script's checkpoints.

    Args:
        made: of this rank.
        arguments: of the script of Megatron-LM.
    """
    if not made.first:
        return
    print(made, flush=True)
    if arguments.get("save"):
        save(made.plan.as_dict(), Path(arguments["save"]), f"memory-stage{made.stage}")


def compared(rows: Sequence[Sequence[float]]) -> Iterator[str]:
    """Return a line for each pipeline stage.

    Args:
        rows: of every rank: stage, budget, predicted peak, measured peak; bytes.
    """
    from ms_memory.planner.report import size

    for stage in sorted({row[0] for row in rows}):
        of_stage = [row for row in rows if row[0] == stage]
        budget, predicted, measured = (max(row[i] for row in of_stage) for i in (1, 2, 3))
        line = (
            f"memory of stage {stage:.0f}: budget {size(int(budget))}, predicted peak"
            f" {size(int(predicted))}, measured {size(int(measured))}"
        )
        over = measured - budget
        yield line + (f": {size(int(over))} more than the budget" if over > 0 else "")
