"""The kernels as Triton compiles them for a GPU, which needs none: launches, code, graphs."""

import inspect
import subprocess
import sys

import pytest
import torch
import triton
from torch._subclasses.fake_tensor import FakeTensorMode
from torch._subclasses.functional_tensor import dispatch_functionalize
from torch.fx.experimental.proxy_tensor import make_fx
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import ms_ops
from ms_ops import opdef, registry, selftest, testing
from ms_ops import triton as ours

OPERATORS = [op for op in testing.OPERATORS if "triton" in registry.backends(op)]
TYPES = {
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
HOPPER = GPUTarget("cuda", 90, 32)


class Context:
    """What autograd hands to an operator's formula."""

    def __init__(self, inputs):
        self.needs_input_grad = [True] * inputs

    def save_for_backward(self, *tensors):
        self.saved_tensors = tensors

    def mark_non_differentiable(self, *tensors):
        pass


def meta(value):
    if not isinstance(value, torch.Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")


def launches(op, dtype):
    """Run forward and backward of all samples on tensors without data: (kernel, args, options)."""
    found = []
    definition = opdef.OPERATORS[op].definition
    kernel = registry.backends(op)["triton"].kernels[op]

    def launch(self, grid, *args, **options):
        assert all(not isinstance(n, int) or n > 0 for n in grid)
        found.append((self, args, options))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ours.Jit, "launch", launch)
        patch.setitem(
            vars(opdef.OPERATORS[op]), "backward_op", lambda *args: kernel.backward(*args[:-1])
        )
        for sample in testing.OPERATORS[op].samples(dtype, "cpu"):
            args = [meta(a) for a in sample.args]
            kwargs = {k: meta(a) for k, a in sample.kwargs.items()}
            prepared = definition.prepare(*args, **kwargs)
            out = kernel.forward(*prepared)
            context = Context(len(prepared) + 1)
            definition.save(context, (*prepared, "triton"), out)
            grads = [torch.empty_like(o) for o in (out if isinstance(out, tuple) else (out,))]
            definition.grad(context, *grads)
    return found


def named(launch):
    """The arguments of a launch by the names of the kernel's parameters."""
    kernel, args, options = launch
    names = list(inspect.signature(kernel.function).parameters)
    values = dict(zip(names, args, strict=False)) | options
    assert len(args) + len(options) - 1 == len(names)
    assert values.keys() - {"num_warps"} == set(names)
    return values


def source(launch):
    """What Triton compiles for a launch: numbers of 1 are known to the compiler, as in Triton."""
    values = named(launch)
    values.pop("num_warps")
    kernel = launch[0].made()
    signature, constants = {}, {}
    for name, value in values.items():
        if isinstance(value, torch.Tensor):
            signature[name] = TYPES[value.dtype]
        elif name.isupper() or value == 1:
            signature[name], constants[name] = "constexpr", value
        else:
            assert isinstance(value, int)
            signature[name] = "i32"
    return ASTSource(kernel, signature, constants)


@pytest.fixture(scope="module")
def every_launch():
    return {
        op: [n for d in (torch.bfloat16, torch.float64) for n in launches(op, d)]
        for op in OPERATORS
    }


def test_every_launch_fills_every_parameter(every_launch):
    counts = {op: len([named(launch) for launch in found]) for op, found in every_launch.items()}
    assert len(counts) == 10
    assert min(counts.values()) > 20


def test_every_kernel_compiles_for_a_gpu(every_launch, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    fullest = {}
    for launch in (launch for found in every_launch.values() for launch in found):
        flags = sum(bool(value) for name, value in launch[2].items() if name.isupper())
        if flags > fullest.get(launch[0], (0, None))[0]:
            fullest[launch[0]] = (flags, launch)
    assert len(fullest) == 10
    for _, launch in fullest.values():
        options = {"num_warps": launch[2]["num_warps"]}
        made = triton.compile(source(launch), target=HOPPER, options=options)
        assert made.asm["cubin"]


@pytest.mark.parametrize("op", OPERATORS)
def test_a_trace_with_open_sizes_holds_one_kernel(op):
    sample = testing.find_sample(op, testing.OPERATORS[op].resized[0], torch.bfloat16)
    prepared = opdef.OPERATORS[op].definition.prepare(*sample.args, **sample.kwargs)

    def run(*tensors):
        rest = iter(tensors)
        args = [next(rest) if isinstance(a, torch.Tensor) else a for a in prepared]
        return opdef.OPERATORS[op].forward_op(*args, "triton")

    tensors = [meta(a) for a in prepared if isinstance(a, torch.Tensor)]
    graph = make_fx(dispatch_functionalize(run), tracing_mode="symbolic")(*tensors).graph
    names = [str(node.target) for node in graph.nodes if node.op == "call_function"]
    assert names.count("triton_kernel_wrapper_functional") == 1
    assert not any(name.startswith("ms.") for name in names)
    (kernel,) = (n for n in graph.nodes if str(n.target) == "triton_kernel_wrapper_functional")
    assert not isinstance(kernel.kwargs["grid"][0][0], int)


def test_cuda_tensors_are_served_first():
    with FakeTensorMode():
        x = torch.empty(6, 16, dtype=torch.bfloat16, device="cuda")
        assert "triton (priority 20): can serve" in ms_ops.explain("swiglu", x)
        graph = make_fx(dispatch_functionalize(ms_ops.swiglu))(x).graph
    assert "triton_kernel_wrapper_functional" in [str(node.target) for node in graph.nodes]


@pytest.mark.parametrize(
    ("device", "reason"),
    [
        ("cuda", None),
        ("cpu", "tensors on cpu, need cuda, or TRITON_INTERPRET=1"),
        ("xpu", "tensors on xpu, need cuda"),
        ("npu", "tensors on npu, need the package triton-ascend"),
    ],
)
def test_who_is_served(device, reason):
    facts = ms_ops.Facts(device, torch.float32)
    assert {v.backend: v.reason for v in ms_ops.verdicts("rope", facts)}["triton"] == reason


def test_selftest_without_gpu_and_interpreter(capsys):
    assert selftest.main(["--backend", "triton"]) == 2
    assert "need cuda, or TRITON_INTERPRET=1" in capsys.readouterr().err


def test_a_choice_does_not_import_triton():
    code = (
        "import sys, torch, ms_ops\n"
        "x = torch.randn(4, 8)\n"
        "print(ms_ops.explain('rms_norm', x, x[0]))\n"
        "assert 'ms_ops.norm.triton' in sys.modules and 'triton' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "triton (priority 20): tensors on cpu" in done.stdout
