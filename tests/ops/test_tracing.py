"""torch's tracers: custom-op checks, torch.compile without graph breaks, what a graph holds."""

import pytest
import torch
import torch._dynamo.testing
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import ms_ops
from ms_ops import testing
from ms_ops.activation import reference
from support.compiler import has_compiler


def traced():
    for op, test in testing.OPERATORS.items():
        for name in test.traced:
            yield pytest.param(op, name, "portable", id=f"{op}-{name}-portable")
        # Derivative and fakes are the operator's, whatever the backend; of the reference, what a
        # trace needs of its kernels is looked at below.
        yield pytest.param(op, test.traced[0], "reference", id=f"{op}-{test.traced[0]}-reference")


@pytest.mark.parametrize(("op", "name", "backend"), list(traced()))
def test_custom_op_checks(op, name, backend):
    sample = testing.find_sample(op, name, torch.float32)
    testing.check_custom_op(op, sample, backend, traced=backend == "portable")


@pytest.mark.parametrize("op", testing.OPERATORS)
def test_compiled_with_dynamic_shapes_and_one_graph_for_all_sizes(op):
    test = testing.OPERATORS[op]
    samples = [testing.find_sample(op, name, torch.float32) for name in test.resized]
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = testing.check_compiled(op, samples, "portable", counter)
    sample, counts = samples[0], []
    with ms_ops.backend(**{op: "portable"}):
        for repeats in (2, 3, 5):
            rows, kwargs = list(sample.args), dict(sample.kwargs)
            for place, dim in test.grows.items():
                sizes = [repeats if i == dim else 1 for i in range(rows[place].dim())]
                rows[place] = rows[place].repeat(sizes)
            for place in sample.differentiable:  # as those it was compiled for
                where = kwargs if isinstance(place, str) else rows
                where[place] = where[place].detach().requires_grad_()
            compiled(*rows, **kwargs)
            counts.append(counter.frame_count)
    assert counts[0] == counts[-1]


@pytest.mark.skipif(not has_compiler(), reason="inductor finds no C++ compiler")
@pytest.mark.parametrize("op", testing.OPERATORS)
def test_compiled_by_inductor(op):
    samples = [testing.find_sample(op, testing.OPERATORS[op].resized[0], torch.float32)]
    testing.check_compiled(op, samples, "portable", "inductor")


class Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names, self.calls = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


def whole_in_graphs(op):
    return ms_ops.opdef.OPERATORS[op].definition.opaque


@pytest.mark.parametrize("op", [op for op in testing.OPERATORS if not whole_in_graphs(op)])
def test_the_reference_reads_no_values_and_takes_any_sizes(op):
    """Its kernels become part of graphs: forward and backward run on sizes without numbers."""
    sample = testing.find_sample(op, testing.OPERATORS[op].traced[0], torch.float32)
    with Recorder() as recorder, ms_ops.backend(**{op: "reference"}):
        testing.check_deterministic(op, sample, "reference")
    calls = {str(func): (func, args) for func, args in recorder.calls if func.namespace == "ms"}
    assert len(calls) == 1 + bool(sample.differentiable)
    kernel = ms_ops.registry.kernel(op, "reference")
    with FakeTensorMode(shape_env=ShapeEnv()) as mode:
        for name, (_, args) in calls.items():
            run = kernel.backward if name.endswith("_backward.default") else kernel.forward
            fakes = tree_map_only(torch.Tensor, mode.from_tensor, args[:-1])
            assert any(isinstance(n, torch.SymInt) for n in tree_leaves(fakes)[0].shape)
            run(*fakes)


@pytest.mark.parametrize("op", testing.OPERATORS)
def test_eager_call_is_one_dispatcher_op(op):
    sample = testing.find_sample(op, testing.OPERATORS[op].resized[0], torch.float32)
    with Recorder() as recorder:
        testing.OPERATORS[op].function(*sample.args, **sample.kwargs)
    assert recorder.names == [f"ms.{op}.default"]


@pytest.mark.parametrize("op", testing.OPERATORS)
def test_compiled_graphs_hold_an_op_only_if_it_must_stay_whole(op):
    torch._dynamo.reset()
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph.forward

    backend = torch._dynamo.backends.common.aot_autograd(fw_compiler=keep, bw_compiler=keep)
    test, definition = testing.OPERATORS[op], ms_ops.opdef.OPERATORS[op].definition
    sample = testing.find_sample(op, test.resized[0], torch.float32)
    args = list(sample.args)
    if sample.differentiable:
        args[0] = args[0].detach().requires_grad_()
    compiled = torch.compile(test.function, fullgraph=True, backend=backend)
    out = compiled(*args, **sample.kwargs)
    out = out[0] if isinstance(out, tuple) else out
    if sample.differentiable:
        out.backward(torch.randn_like(out))
    calls = [n for g in graphs for n in g.graph.nodes if n.op == "call_function"]
    # An op that writes into an argument is the first argument of torch's functional form of it.
    targets = [str(part) for call in calls for part in (call.target, *call.args[:1])]
    assert len(graphs) == 1 + bool(sample.differentiable)
    assert targets
    assert any(t.startswith("ms.") for t in targets) == definition.opaque


def test_a_trace_keeps_the_backend_it_was_made_with():
    torch._dynamo.reset()

    def twice(x, dim):
        return 2 * reference.forward(x, dim)

    kernels = {"swiglu": ms_ops.Kernel(twice, reference.backward)}
    ms_ops.register_backend("swiglu", ms_ops.Backend("twice", 500, kernels))
    x = torch.randn(4, 8)
    try:
        compiled = torch.compile(ms_ops.swiglu, backend="aot_eager", fullgraph=True)
        with ms_ops.backend(swiglu="twice"):
            inside = compiled(x)
    finally:
        ms_ops.unregister_backend("swiglu", "twice")
    assert torch.equal(compiled(x), inside)
    torch.testing.assert_close(inside, 2 * ms_ops.swiglu(x))
