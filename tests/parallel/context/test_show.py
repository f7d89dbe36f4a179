"""Plans as text, as plain data and as digests."""

import json
import runpy
from collections import Counter
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import torch

from ms_parallel.context.build import plan_attention
from ms_parallel.context.layout import SeqLayout
from ms_parallel.context.mask import AttnMask
from ms_parallel.context.picture import plan_svg
from support.plans import random_plan

TABLE = """\
ring: 2 processes, 2 nodes of 1, causal mask
16 tokens, 8 a process; 4 heads, 2 of keys and values, 4 + 4 channels; keeps last, sums of 4 bytes

forward  node 0    node 1
0        k0:36 >1  k1:36 >0
1        k1:32     k0:32

backward  node 0        node 1
0         k1:32 >1      k0:32 >0
1         k0:36 >1:dkv  k1:36 >0:dkv

a process and row of the batch, 2 bytes per element: mean (most)
bytes sent forward              256 (256)
bytes sent backward             768 (768)
messages                          3 (3)
pairs attended to                68 (68)
collectives                       0"""


def small(mask=None, size=2, **arguments):
    mask = mask or AttnMask.causal()
    return plan_attention(
        SeqLayout.zigzag(16, size), mask, heads=(4, 2), head_dims=(4, 4), **arguments
    )


def test_a_plan_prints_as_a_table():
    assert str(small()) == TABLE


def test_masks_and_kinds_are_named():
    words = {
        "full mask": AttnMask.full(),
        "window (3, all) mask": AttnMask.window(3, None),
        "causal, 2 documents mask": AttnMask.causal((0, 3, 16)),
        "dense mask": AttnMask.from_matrix(torch.ones(16, 16).bool()),
    }
    for text, mask in words.items():
        assert text in str(small(mask))
    assert "gathered" in str(small(algorithm="allgather_kv"))
    assert "1 nodes of 2" in str(small(algorithm="ulysses"))


def test_any_plan_prints_and_is_plain_data():
    for seed in range(40):
        plan = random_plan(seed)
        assert len(str(plan).splitlines()) > 8
        data = json.loads(json.dumps(plan.as_dict()))
        assert data["layout"]["shards"] == [[list(p) for p in s] for s in plan.layout.shards]
        assert len(data["backward"]["transfers"]) == len(plan.backward.transfers)
        assert len(data["forward"]["steps"]) == plan.nodes.size


def test_digests_name_the_field_that_differs():
    one, other = small(), small(kv_keep="kv")
    assert one.digests == replace(one).digests
    differ = {name for name in one.digests if one.digests[name] != other.digests[name]}
    assert differ == {"kv_keep"}
    masks = [AttnMask.from_matrix(torch.full((16, 16), value)) for value in (True, False)]
    assert small(masks[0]).digests["mask"] != small(masks[1]).digests["mask"]


def test_the_picture_shows_every_block_and_message():
    for seed in range(12):
        plan = random_plan(seed)
        for direction in ("forward", "backward"):
            root = ElementTree.fromstring(plan_svg(plan, direction))
            tags = Counter(element.tag.rpartition("}")[2] for element in root.iter())
            program = getattr(plan, direction)
            blocks = [b for steps in program.steps for step in steps for b in step.blocks]
            bars = plan.nodes.size * len(program.steps[0])
            assert tags["polygon"] == sum(b.kind == "causal" for b in blocks)
            assert tags["rect"] == len(blocks) - tags["polygon"] + bars + 2
            assert tags["path"] == len(program.transfers) + 1


def test_the_pictures_of_the_documentation_are_of_this_planner():
    folder = Path(__file__).parents[3] / "docs" / "context"
    for name, text in runpy.run_path(str(folder / "pictures.py"))["pictures"]().items():
        assert (folder / name).read_text(encoding="utf-8") == text
