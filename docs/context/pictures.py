"""Write the pictures of this folder: `python docs/context/pictures.py`."""

from pathlib import Path

from ms_parallel.context import AttnMask, SeqLayout, plan_attention, plan_svg

GIVEN = {"heads": (8, 2), "head_dims": (64, 64)}
DOCUMENTS = (0, 20, 64)


def pictures() -> dict[str, str]:
    """Return the pictures by file name."""
    ring = plan_attention(SeqLayout.zigzag(64, 4), AttnMask.causal(), **GIVEN, pruned=True)
    windows = plan_attention(
        SeqLayout.zigzag_docs(DOCUMENTS, 4), AttnMask.causal(DOCUMENTS), **GIVEN, window=2
    )
    return {"ring.svg": plan_svg(ring), "windows.svg": plan_svg(windows, "backward")}


if __name__ == "__main__":
    for name, text in pictures().items():
        (Path(__file__).parent / name).write_text(text, encoding="utf-8")
