"""The loss curves as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from mindspeed.train.metrics import StepRow


def plot_losses(rows: Mapping[int, Sequence[StepRow]], path: Path) -> bool:
    """Draws one curve a level; says whether matplotlib was there to do it."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for index, (level, curve) in enumerate(rows.items()):
        # Equal curves would hide each other: later ones are drawn thinner and dashed.
        style = "-" if index == 0 else "--"
        losses = [float("nan") if row.loss is None else row.loss for row in curve]
        axes.plot(
            [row.step for row in curve],
            losses,
            style,
            linewidth=3 - index,
            label=f"level {level}",
        )
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    return True
