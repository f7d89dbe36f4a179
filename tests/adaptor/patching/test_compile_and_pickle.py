"""Patched functions are plain functions: they compile, pickle, copy, and count their calls."""

import copy
import inspect
import pickle
import types

import pytest
import torch

VICTIM = """
    import torch
    def f(x, scale=2.0):
        "Scale."
        return x * scale
    class Net(torch.nn.Module):
        def forward(self, x):
            return x + 1
    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x * x
        @staticmethod
        def backward(ctx, grad):
            (x,) = ctx.saved_tensors
            return 2 * x * grad
"""
VALUES = """
    import functools
    def new(x, scale=3.0): return x * scale
    def wrap(original):
        @functools.wraps(original)
        def wrapper(*args, **kwargs):
            return original(*args, **kwargs) + 1
        return wrapper
    def forward(self, x): return x + 5
    def square(original):
        @functools.wraps(original)
        def forward(ctx, x):
            return original(ctx, x) + 1
        return forward
    async def later(x): return x
"""


@pytest.fixture
def patched(lab):
    lab.write("victim", VICTIM)
    lab.write("values", VALUES)
    victim = lab.load("victim")
    handle = lab.apply(
        lab.patch("victim:f"),
        lab.patch("victim:f", "wrap", "values:wrap"),
        lab.patch("victim:Net.forward", value="values:forward"),
        lab.patch("victim:Square.forward", "wrap", "values:square"),
    )
    yield victim, handle
    handle.undo()


def test_a_patched_function_is_a_plain_function_with_the_name_of_the_original(patched):
    victim, _ = patched
    assert type(victim.f) is types.FunctionType
    assert (victim.f.__module__, victim.f.__qualname__) == ("victim", "f")
    assert victim.f.__doc__ == "Scale."
    assert inspect.signature(victim.f).parameters["scale"].default == 3.0


def test_pickle_and_deepcopy_give_the_same_function(patched):
    victim, _ = patched
    for function in (victim.f, victim.Net.forward):
        assert pickle.loads(pickle.dumps(function)) is function
        assert copy.deepcopy(function) is function
    assert pickle.loads(pickle.dumps(victim.Net())).forward(torch.ones(1)) == 6


def test_what_was_pickled_while_patched_is_the_original_afterwards(patched):
    victim, handle = patched
    data = pickle.dumps(victim.f)
    handle.undo()
    assert pickle.loads(data) is victim.f
    assert victim.f(torch.ones(1)) == 2


def test_fullgraph_compilation_of_functions_methods_and_autograd_functions(patched):
    victim, handle = patched
    net = victim.Net()

    def run(x):
        return victim.Square.apply(net(victim.f(x, scale=2.0)))

    compiled = torch.compile(run, fullgraph=True, backend="eager")
    x = torch.arange(3.0, requires_grad=True)
    expected = (2 * x + 6) ** 2 + 1
    assert torch.equal(compiled(x), expected)
    (grad,) = torch.autograd.grad(compiled(x).sum(), x)
    assert torch.equal(grad, 4 * (2 * x + 6))
    assert handle.never_called() == ()


def test_counting_does_not_recompile(patched):
    victim, handle = patched
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(victim.f, fullgraph=True, backend=counter)
    x = torch.ones(3)
    for _ in range(5):
        victim.f(x)
        compiled(x)
    assert counter.frame_count == 1
    assert handle.calls()["victim:f"] == 5


def test_never_called_names_what_nobody_reached(patched):
    victim, handle = patched
    assert set(handle.never_called()) == {
        "victim:f",
        "victim:Net.forward",
        "victim:Square.forward",
    }
    victim.f(torch.ones(1))
    victim.Net()(torch.ones(1))
    assert handle.never_called() == ("victim:Square.forward",)
    assert handle.calls() == {"victim:f": 1, "victim:Net.forward": 1, "victim:Square.forward": 0}
    handle.undo()
    assert handle.never_called() == ("victim:Square.forward",)


def test_async_functions_and_classes_are_left_as_they_are(lab):
    lab.write("victim", "def f(): pass\nclass C: pass")
    lab.write("values", VALUES + "\n    class New: pass")
    victim, values = lab.load("victim"), lab.load("values")
    with lab.apply(
        lab.patch("victim:f", value="values:later"), lab.patch("victim:C", value="values:New")
    ) as handle:
        assert victim.f is values.later
        assert victim.C is values.New
        assert handle.calls() == {}
        assert handle.never_called() == ()
