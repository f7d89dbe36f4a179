"""Malformed records are refused when they are made, with the record and the field named."""

import dataclasses

import pytest

from mindspeed.patching import Feature, Flag, Patch, Rule
from mindspeed.patching.records import Choice

GOOD = {"target": "megatron.a:B.c", "kind": "wrap", "value": "x.y:z", "reason": "because"}


def test_a_patch_is_frozen_and_knows_its_parts():
    patch = Patch(**GOOD)
    assert (patch.module, patch.path) == ("megatron.a", "B.c")
    with pytest.raises(dataclasses.FrozenInstanceError):
        patch.target = "elsewhere"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"target": "megatron.a.B.c"}, "package.module:attr.path"),
        ({"target": "megatron.a:B c"}, "package.module:attr.path"),
        ({"target": "megatron.a:b", "kind": "stub_module"}, "package.module"),
        ({"target": "torch:compile"}, "torch stays unchanged"),
        ({"target": "torch.cuda:is_available"}, "torch stays unchanged"),
        ({"kind": "decorate"}, "'replace', 'wrap', 'set', 'add', 'stub_module'"),
        ({"value": "x.y.z"}, "pkg.module:obj"),
        ({"value": None}, "pkg.module:obj"),
        ({"probe": "x"}, "pkg.module:obj"),
        ({"reason": " "}, "reason"),
        ({"order": "1"}, "order"),
        ({"versions": "0.14 or so"}, "version range"),
    ],
)
def test_a_malformed_patch_is_refused(change, words):
    with pytest.raises(ValueError, match=words):
        Patch(**{**GOOD, **change})


def test_a_flag_derives_its_attribute_and_its_default():
    flag = Flag("--swap-attention", help="what it means")
    assert (flag.dest, flag.default) == ("swap_attention", False)
    assert Flag("--no-x", type="inverse", help="h").default is True


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"name": "swap"}, "--lower-case-words"),
        ({"aliases": ("-s",)}, "--lower-case-words"),
        ({"type": "bool"}, "type"),
        ({"status": "someday"}, "status"),
        ({"help": ""}, "help"),
        ({"status": "native"}, "maps_to"),
        ({"status": "dropped"}, "reason"),
        ({"type": "int", "choices": (1, 2), "default": 3}, "default"),
    ],
)
def test_a_malformed_flag_is_refused(change, words):
    with pytest.raises(ValueError, match=words):
        Flag(**{"name": "--swap", "help": "what it means", **change})


def test_a_choice_names_a_flag_and_a_value():
    choice = Choice("--position-embedding-type", "alibi")
    assert choice.attribute == "position_embedding_type"
    assert str(choice) == "--position-embedding-type alibi"
    for wrong in (("position", "alibi"), ("--position", " ")):
        with pytest.raises(ValueError, match="choice"):
            Choice(*wrong)


@pytest.mark.parametrize(
    ("change", "words"),
    [({"kind": "needs"}, "kind"), ({"left": ""}, "left"), ({"text": ""}, "text")],
)
def test_a_malformed_rule_is_refused(change, words):
    good = {"kind": "requires", "left": "a", "right": "b", "text": "a needs b"}
    with pytest.raises(ValueError, match=words):
        Rule(**{**good, **change})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"name": "has space"}, "name"),
        ({"level": 3}, "level"),
        ({"patches": [Patch(**GOOD)]}, "patches must be a tuple"),
        ({"packages": ("ms-ops", 1)}, "packages"),
        ({"choices": ("--swap much",)}, "choices must be a tuple of Choice"),
        ({"doc": ""}, "doc"),
        ({"advise": "nowhere"}, "advise"),
    ],
)
def test_a_malformed_feature_is_refused(change, words):
    with pytest.raises(ValueError, match=words):
        Feature(**{"name": "a.b", "level": 1, "doc": "what it does", **change})
