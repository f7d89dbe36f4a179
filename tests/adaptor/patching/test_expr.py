"""The expression language: what it computes, and what it refuses."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mindspeed.patching.expr import ExprError, parse

VALUES = {"a": 8, "b": 3, "on": True, "off": False, "none": None, "name": "rope"}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a % b == 2", True),
        ("a // b * 2 + 1 - b", 2),
        ("-a < b <= 3", True),
        ("on and not off", True),
        ("none or a", 8),
        ("off and undefined_is_never_reached", False),
        ("name in ('rope', 'yarn')", True),
        ("name not in ('yarn',)", True),
        ("none is None", True),
        ("a is not None", True),
        ("name == 'rope' and a >= 8", True),
    ],
)
def test_values(text, value):
    assert parse(text).evaluate({**VALUES, "undefined_is_never_reached": 0}) == value


@pytest.mark.parametrize(
    "text",
    [
        "f(a)",
        "a.b",
        "a[0]",
        "lambda: a",
        "[x for x in a]",
        "a ** b",
        "f'{a}'",
        "(a := 1)",
        "a if b else c",
        "b'x'",
        "...",
        "__import__('os')",
        "a; b",
        "",
        "x" * 401,
    ],
)
def test_everything_else_is_refused(text):
    with pytest.raises(ExprError):
        parse(text)


def test_an_undeclared_name_is_refused_with_the_nearest_one():
    with pytest.raises(ExprError, match=r"'sequence_paralel' is not declared.*sequence_parallel"):
        parse("sequence_paralel and a").check(["sequence_parallel", "a"])


@pytest.mark.parametrize("text", ["none + 1 == 2", "name % 2 == 0", "name * 3 == 'x'", "none < 3"])
def test_what_has_no_value_is_an_error_with_the_values_named(text):
    with pytest.raises(ExprError, match=r"(none=None|name='rope')"):
        parse(text).evaluate(VALUES)


def test_division_by_zero_is_an_error_of_ours():
    with pytest.raises(ExprError, match="off"):
        parse("a % (off * 1) == 0").evaluate(VALUES)


_numbers = st.sampled_from(["a", "b", "1", "2", "7"])
_sums = st.recursive(
    _numbers,
    lambda inner: st.builds("({} {} {})".format, inner, st.sampled_from("+-*"), inner),
    max_leaves=5,
)
_tests = st.builds("{} {} {}".format, _sums, st.sampled_from(["<", "<=", "==", "!=", ">"]), _sums)
_formulas = st.recursive(
    _tests | st.sampled_from(["on", "off"]),
    lambda inner: (
        st.builds("({} {} {})".format, inner, st.sampled_from(["and", "or"]), inner)
        | st.builds("(not {})".format, inner)
    ),
    max_leaves=6,
)


@given(_formulas)
@settings(max_examples=150, deadline=None)
def test_it_agrees_with_python(text):
    if len(text) <= 400:
        assert parse(text).evaluate(VALUES) == eval(text, {"__builtins__": {}}, VALUES)
