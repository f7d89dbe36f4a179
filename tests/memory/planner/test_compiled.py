"""What a model compiles stays compiled when it has been measured."""

import torch
from torch import nn

from ms_memory import planner
from support.mutation import Mutation, assert_caught

STANCE = Mutation(
    "the census is traced",
    "ms_memory.planner.measure:record",
    'stack.enter_context(torch.compiler.set_stance("force_eager"))',
    "pass",
)


class Layer(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.linear, self.function = nn.Linear(4, 4), function

    def forward(self, x):
        return x + self.function(self.linear(x))


class Model(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.layers = nn.ModuleList(Layer(function) for _ in range(2))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x.sum()


def check_compiled_calls():
    calls = []

    def backend(graph, inputs):
        return lambda *args: calls.append(graph) or graph(*args)

    def twice(x):
        return torch.nn.functional.gelu(x) * 2

    torch.compiler.reset()
    model = Model(torch.compile(twice, backend=backend))
    x = torch.ones(2, 4, requires_grad=True)
    planner.profile(model, lambda: model(x), actions=(), steps=1)
    calls.clear()
    model(x)
    assert len(calls) == len(model.layers)


def test_measuring_leaves_functions_compiled():
    assert_caught(STANCE, check_compiled_calls)
