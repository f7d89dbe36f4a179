"""The flag table: complete, consistent with Megatron's, and acted upon on every command line."""

import argparse
import contextlib
import hashlib
import io
import warnings
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mindspeed import tables
from mindspeed.features import add_flags, load_features
from mindspeed.features.arguments import parse_megatron
from mindspeed.features.flags import flag_rows, refusal, unserved_flags
from mindspeed.features.native import (
    NativeFlag,
    add_native,
    native_defaults,
    native_flags,
    rows_from_parser,
)
from mindspeed.patching.plan import draft

ROWS = {row.flag.name: row for row in flag_rows()}
NATIVE = {name: flag for flag in native_flags() for name in flag.names}
PAGE = Path(__file__).parents[3] / "docs" / "flags.md"


def by_status(status):
    return [row for row in flag_rows() if row.flag.status == status]


def test_all_168_flags_are_there_once():
    spellings = [name for row in flag_rows() for name in (row.flag.name, *row.flag.aliases)]
    assert len(flag_rows()) == 168
    assert len(spellings) == len(set(spellings))
    assert {"--pre-tockens", "--next-tockens"} <= set(spellings)
    frozen = hashlib.sha256("\n".join(sorted(ROWS)).encode()).hexdigest()
    assert frozen.startswith("f2a4ffe75c88ad15")


def test_the_page_is_up_to_date():
    """Fails after a change of the table: run `mindspeed flags --markdown > docs/flags.md`."""
    assert PAGE.read_text() == tables.flags_markdown()


@pytest.mark.parametrize("row", by_status("native"), ids=lambda row: row.flag.name)
def test_a_native_flag_names_one_of_megatrons_that_takes_the_same_values(row):
    native = NATIVE[row.flag.maps_to]
    valueless = ("switch", "inverse")
    if row.flag.type in valueless:
        assert native.type in valueless
    else:
        assert native.type == row.flag.type.rstrip("+")
        assert (native.nargs == "+") == row.flag.type.endswith("+")


def test_flags_that_megatron_has_under_their_own_name_are_native():
    shared = {name for name in ROWS if name in NATIVE}
    native = {row.flag.name for row in by_status("native") if row.flag.maps_to == row.flag.name}
    # One flag of Megatron's acts on this project's profiler, with a default of its own.
    assert shared - native == {"--profile-ranks"}
    assert len(shared) == 8


def test_every_kept_flag_belongs_to_a_built_feature():
    owners = {flag.name: f.name for f in load_features() for flag in f.flags}
    assert {row.flag.name: row.feature for row in by_status("kept")}.items() <= owners.items()


def test_packages_and_levels_are_real():
    packages = {"mindspeed", "ms-ops", "ms-parallel", "ms-memory", "ms-moe", "ms-profile"}
    for row in flag_rows():
        assert row.package in packages
        assert row.level in (0, 1, 2)
        assert row.flag.help[0].isupper()


def value_for(flag):
    if flag.type in ("switch", "inverse"):
        return []
    return [
        str(flag.choices[0]) if flag.choices else {"float": "0.5", "str": "x"}.get(flag.type, "1")
    ]


@pytest.mark.parametrize(
    "row", by_status("planned") + by_status("dropped"), ids=lambda row: row.flag.name
)
def test_a_flag_that_does_not_act_is_an_error_that_says_so(row, capsys, parser):
    with pytest.raises(SystemExit) as caught:
        parser.parse_args([row.flag.name, *value_for(row.flag)])
    assert caught.value.code == 2
    text = capsys.readouterr().err
    assert refusal(row.flag) in text
    assert len(text.splitlines()) == 1
    assert ("planned" in text) == (row.flag.status == "planned")


@pytest.fixture(scope="module")
def parser():
    made = argparse.ArgumentParser(prog="pretrain", allow_abbrev=False)
    add_native(made)
    return add_flags(made)


def test_other_spellings_act_as_megatrons_flag(parser):
    for argv, dest, value in (
        (["--qk-rope-head-dim", "32"], "qk_pos_emb_head_dim", 32),
        (["--rope-scaling-mscale", "0.7"], "mscale", 0.7),
        (["--tokenizer-name-or-path", "gpt2"], "tokenizer_model", "gpt2"),
        (["--multi-head-latent-attention"], "multi_latent_attention", True),
        (["--disable-gloo-group"], "enable_gloo_process_groups", False),
    ):
        with pytest.warns(UserWarning, match=r"is Megatron's --.*; taken as that"):
            parsed = parser.parse_args(argv)
        assert getattr(parsed, dest) == value


def test_without_our_flags_the_namespace_is_megatrons_own(parser):
    plain = argparse.ArgumentParser(allow_abbrev=False)
    add_native(plain)
    ours, theirs = vars(parser.parse_args([])), vars(plain.parse_args([]))
    kept = {flag.attribute for feature in load_features() for flag in feature.flags}
    assert ours.keys() - theirs.keys() == kept - theirs.keys()
    assert (ours["profile_ranks"], theirs["profile_ranks"]) == ((-1,), [0])
    assert {name: ours[name] for name in theirs} == {**theirs, "profile_ranks": (-1,)}


def test_a_flag_that_the_parser_has_already_is_left_alone():
    parser = argparse.ArgumentParser()
    parser.add_argument("--swap-attention", action="store_true")
    parser.add_argument("--optimization-level", default="mine")
    assert add_flags(parser).parse_args(["--swap-attention"]).swap_attention is True
    assert parser.parse_args([]).optimization_level == "mine"


def test_unknown_flags_are_answered_with_the_nearest(capsys, parser):
    for flag, near in (("--tensor-model-paralel-size=2", "'--tensor-model-parallel-size'"),
                       ("--swap-atention", "'--swap-attention'")):  # fmt: skip
        with pytest.raises(SystemExit) as caught:
            parser.parse_args([flag])
        assert caught.value.code == 2
        assert near in capsys.readouterr().err


def test_other_errors_of_the_parser_stay(capsys, parser):
    with pytest.raises(SystemExit):
        parser.parse_args(["--num-layers", "many"])
    assert "invalid int value: 'many'" in capsys.readouterr().err


def test_negative_numbers_and_equal_signs_are_values_and_not_flags():
    parsed = parse_megatron(["--lr", "-0.5", "--num-layers=4", "--optimization-level=1"])
    assert (parsed.lr, parsed.num_layers, parsed.optimization_level) == (-0.5, 4, 1)


def test_the_default_level_is_what_is_installed(monkeypatch):
    monkeypatch.setattr("mindspeed.levels.is_installed", lambda name: False)
    assert parse_megatron([]).optimization_level == 0


def test_no_unserved_flag_shares_a_name_with_megatron():
    taken = set(native_defaults())
    assert not {flag.attribute for flag in unserved_flags()} & taken


@st.composite
def command_lines(draw):
    """Up to six flags, ours and Megatron's, each with a value of its kind, right or wrong."""
    line = []
    for name in draw(st.lists(st.sampled_from(sorted({*ROWS, *NATIVE})), max_size=6)):
        line.append(name)
        line.extend(draw(st.lists(st.sampled_from(["1", "-2", "0.5", "x", "[1]*2"]), max_size=2)))
    return line


@given(command_lines(), st.sampled_from([0, 1, 2]))
@settings(max_examples=200, deadline=None)
def test_any_command_line_gives_a_plan_or_an_explanation(line, level):
    errors, status = io.StringIO(), 0
    with contextlib.redirect_stderr(errors), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            config = parse_megatron(line)
        except SystemExit as stop:
            status = stop.code
    if status:
        assert status == 2
        assert errors.getvalue().startswith("megatron: error: ")
        return
    made = draft(config, level, "cpu", "0.16.1")
    assert made.acting or made.problems
    assert all(len(text.split()) > 3 for text in made.problems)


def test_native_rows_are_what_a_live_parser_gives():
    parser = argparse.ArgumentParser()
    add_native(parser)
    rows = {tuple(row["names"]): row for row in rows_from_parser(parser)}
    assert len(rows) == len(native_flags())
    for flag in native_flags():
        row = rows[flag.names]
        again = NativeFlag(**{**row, "names": flag.names, "choices": tuple(row.get("choices", ()))})
        assert (again.dest, again.default, again.nargs) == (flag.dest, flag.default, flag.nargs)
        assert again.type == flag.type or flag.type == "other"
