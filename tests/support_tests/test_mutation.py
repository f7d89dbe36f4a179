"""Mutations change exactly what they name, for exactly as long as they are held."""

import functools

import pytest

from support.mutation import Mutation, assert_caught


def scaled(x, factor=3):
    # A comment, so that line numbers matter.
    return x * factor


taken_by_value = scaled


def through_decorator(fn):
    @functools.wraps(fn)
    def inner(*args):
        return fn(*args) + 1

    return inner


@through_decorator
def decorated(x):
    return x * 2


class Base:
    def size(self):
        return 1


class Derived(Base):
    def size(self):
        return super().size() + 10

    @staticmethod
    def shift(x):
        return x - 1


HERE = __name__


def test_mutation_reaches_copies_and_ends():
    with Mutation("plus", f"{HERE}:scaled", "x * factor", "x + factor").applied():
        assert scaled(10) == 13
        assert taken_by_value(10) == 13
        assert scaled(10, factor=1) == 11
    assert scaled(10) == 30


def test_mutation_ends_after_an_exception():
    with (
        pytest.raises(RuntimeError),
        Mutation("plus", f"{HERE}:scaled", "x * factor", "x + factor").applied(),
    ):
        raise RuntimeError
    assert scaled(10) == 30


@pytest.mark.parametrize(
    ("target", "old", "new", "call", "before", "after"),
    [
        ("decorated", "* 2", "* 5", lambda: decorated(10), 21, 51),
        ("Derived.size", "+ 10", "+ 20", lambda: Derived().size(), 11, 21),
        ("Derived.shift", "- 1", "- 2", lambda: Derived.shift(0), -1, -2),
    ],
)
def test_decorated_methods_and_super(target, old, new, call, before, after):
    assert call() == before
    with Mutation("changed", f"{HERE}:{target}", old, new).applied():
        assert call() == after
    assert call() == before


def test_text_that_is_not_there_is_an_error():
    with (
        pytest.raises(ValueError, match="occurs 0 times"),
        Mutation("stale", f"{HERE}:scaled", "x / factor", "x").applied(),
    ):
        pass
    with (
        pytest.raises(ValueError, match="occurs 2 times"),
        Mutation("ambiguous", f"{HERE}:scaled", "factor", "f").applied(),
    ):
        pass


def check_scaled():
    assert scaled(2) == 6


def check_nothing():
    assert callable(scaled)


def check_broken():
    assert scaled(2) == 7


def test_assert_caught():
    plus = Mutation("plus", f"{HERE}:scaled", "x * factor", "x + factor")
    assert_caught(plus, check_scaled)
    with pytest.raises(AssertionError, match="does not notice the mutation 'plus'"):
        assert_caught(plus, check_nothing)
    with pytest.raises(AssertionError, match="7"):
        assert_caught(plus, check_broken)
