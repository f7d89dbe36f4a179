"""A plan as a picture: who computes which part of the score matrix, when, and what travels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from .plan import AttnPlan, Block, Program

MATRIX = 320
MARGIN = 46
COLUMN, ROW = 92, 40
BAR = 22


def plan_svg(plan: AttnPlan, direction: Literal["forward", "backward"] = "forward") -> str:
    """Return a picture of a plan as the text of an SVG file.

    On the left the score matrix in the order of the sequence, queries downwards: a colour a node,
    the number of the step in every block; what is white nobody attends to. On the right a row a
    node and a column a step: bars are as long as the step's pairs of query and key, arrows are
    messages from the step in which they are posted to the step that needs them (partial sums
    dashed).

    Args:
        plan: the plan.
        direction: which of its programs.
    """
    program: Program = plan.forward if direction == "forward" else plan.backward
    nodes, steps = plan.nodes.size, len(program.steps[0])
    width = MARGIN + MATRIX + 2 * MARGIN + COLUMN * steps
    height = 2 * MARGIN + max(MATRIX, ROW * nodes)
    body = [*_matrix(plan, program), *_steps(program, nodes, steps)]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}"'
            f' width="{width}" height="{height}" font-family="sans-serif" font-size="11">',
            '<defs><marker id="head" viewBox="0 0 6 6" refX="5" refY="3" markerWidth="6"'
            ' markerHeight="6" orient="auto"><path d="M0 0L6 3L0 6z" fill="#444"/></marker></defs>',
            f'<rect width="{width}" height="{height}" fill="white"/>',
            *body,
            "</svg>\n",
        ]
    )


def _colour(node: int, nodes: int) -> str:
    return f"hsl({360 * node // nodes}, 62%, {58 + 14 * (node % 2)}%)"


def _text(x: float, y: float, text: str, more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}"{more}>{text}</text>'


def _matrix(plan: AttnPlan, program: Program) -> Iterator[str]:
    scale = MATRIX / max(1, plan.layout.total)
    yield _text(MARGIN, MARGIN - 26, f"{plan.algorithm}, {plan.layout.size} processes")
    yield _text(MARGIN, MARGIN - 10, "keys")
    down = f' transform="rotate(-90 {MARGIN - 10} {MARGIN + 50})"'
    yield _text(MARGIN - 10, MARGIN + 50, "queries", down)
    for node, steps in enumerate(program.steps):
        for t, step in enumerate(steps):
            for block in step.blocks:
                yield from _block(block, t, scale, _colour(node, plan.nodes.size))
    yield (
        f'<rect x="{MARGIN}" y="{MARGIN}" width="{MATRIX}" height="{MATRIX}" fill="none"'
        ' stroke="#444"/>'
    )


def _block(block: Block, step: int, scale: float, colour: str) -> Iterator[str]:
    x, y = MARGIN + block.k_pos * scale, MARGIN + block.q_pos * scale
    wide, high = (block.k1 - block.k0) * scale, (block.q1 - block.q0) * scale
    style = f'fill="{colour}" stroke="white" stroke-width="0.5"'
    if block.kind == "causal":
        points = f"{x:.2f},{y:.2f} {x:.2f},{y + high:.2f} {x + wide:.2f},{y + high:.2f}"
        yield f'<polygon points="{points}" {style}/>'
    else:
        part = "" if block.kind == "full" else ' fill-opacity="0.5"'
        yield (
            f'<rect x="{x:.2f}" y="{y:.2f}" width="{wide:.2f}" height="{high:.2f}" {style}{part}/>'
        )
    if min(wide, high) >= 14:
        shift = (1 / 3, 2 / 3) if block.kind == "causal" else (0.5, 0.5)
        at = x + wide * shift[0], y + high * shift[1] + 4
        yield _text(*at, str(step), ' text-anchor="middle"')


def _steps(program: Program, nodes: int, steps: int) -> Iterator[str]:
    left, top = 2 * MARGIN + MATRIX + MARGIN // 2, MARGIN
    work = [[sum(b.cells for b in step.blocks) for step in row] for row in program.steps]
    most = max([1, *(cells for row in work for cells in row)])
    for t in range(steps):
        yield _text(left + COLUMN * t, top - 10, f"step {t}")
    for node in range(nodes):
        y = top + ROW * node
        yield _text(left - 8, y + 15, str(node), ' text-anchor="end"')
        for t, cells in enumerate(work[node]):
            x, wide = left + COLUMN * t, (COLUMN - 30) * cells / most
            yield (
                f'<rect x="{x}" y="{y}" width="{wide:.1f}" height="{BAR}"'
                f' fill="{_colour(node, nodes)}"/>'
            )
            if cells:
                yield _text(x + 3, y + 15, str(cells))
    yield from _arrows(program, left, top)


def _arrows(program: Program, left: float, top: float) -> Iterator[str]:
    at: dict[int, tuple[int, bool]] = {}
    posted: dict[int, int] = {}
    for node, steps in enumerate(program.steps):
        for t, step in enumerate(steps):
            at |= dict.fromkeys(step.wait, (t, False)) | dict.fromkeys(step.wait_after, (t, True))
            posted |= {i: t for i in step.post if program.transfers[i].src == node}
    for transfer in program.transfers:
        t, late = at[transfer.index]
        x0 = left + COLUMN * posted[transfer.index] + (8 if not late else 22)
        x1 = left + COLUMN * t + (COLUMN - 26 if late else -2)
        y0 = top + ROW * transfer.src + (BAR if transfer.dst > transfer.src else 0)
        y1 = top + ROW * transfer.dst + BAR / 2
        dashed = ' stroke-dasharray="3 2"' if late else ""
        yield (
            f'<path d="M{x0} {y0}L{x1} {y1}" stroke="#444" stroke-width="0.8" fill="none"'
            f'{dashed} marker-end="url(#head)"/>'
        )
