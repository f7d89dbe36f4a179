"""The table of operators in the documentation names every operator there is."""

from __future__ import annotations

import re

from .workspace import ROOT


def test_every_operator_has_its_row():
    from ms_ops import testing

    page = (ROOT / "docs/ops/index.md").read_text()
    table = page.split("<!-- operators: begin -->")[1].split("<!-- operators: end -->")[0]
    rows = re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)
    assert rows == sorted(testing.OPERATORS)
