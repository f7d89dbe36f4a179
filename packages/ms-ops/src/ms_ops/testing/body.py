"""The one test body: what any backend of any operator has to pass.

Each check takes (operator, sample, backend) and raises AssertionError with the tensor's name.
`check_backend` runs all of them; a backend from elsewhere proves itself by that call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._prims_common import check_significant_strides
from torch._subclasses.fake_tensor import FakeTensorMode

import ms_ops

from .. import registry
from ..opdef import OPERATORS as DEFINED
from .case import Sample
from .cases import OPERATORS
from .tolerance import assert_close

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def find_sample(op: str, name: str, dtype: torch.dtype, device: str = "cpu") -> Sample:
    """Return one sample of an operator by name."""
    return next(s for s in OPERATORS[op].samples(dtype, device) if s.name == name)


@contextmanager
def poisoned_empty() -> Iterator[None]:
    """Fill what torch.empty and its relatives return with NaN, so that an unwritten place shows."""
    before = torch.are_deterministic_algorithms_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        torch.utils.deterministic.fill_uninitialized_memory = filled  # type: ignore[attr-defined]


def check_values(op: str, sample: Sample, backend: str) -> None:
    """Compare all outputs and all gradients with autograd through the fp64 reference."""
    test = OPERATORS[op]
    dtype = _input_dtype(sample)
    with poisoned_empty(), ms_ops.backend(**{op: backend}):
        got = _run(test.function, sample)
    oracle = _run(_reference(op), _cast(sample, torch.float64))
    eager = _run(test.plain, sample)
    kinds = test.outputs + tuple(test.gradients[i] for i in sample.differentiable)
    if sample.kwargs.get("casting") == "llama":
        kinds = tuple("E2" if kind == "E1" else kind for kind in kinds)
    for (name, mine), truth, other, kind in zip(got, oracle, eager, kinds, strict=True):
        where = f"{op}[{backend}] {sample.name} {dtype} {name}"
        assert_close(kind, where, mine, truth[1], other[1], dtype)


def check_gradients(op: str, sample: Sample, backend: str) -> None:
    """Compare the backward with finite differences; the sample must be fp64."""
    test = OPERATORS[op]
    leaves = {i: sample.args[i].detach().clone().requires_grad_() for i in sample.differentiable}

    def outputs(*values: Tensor) -> Tensor:
        args = list(sample.args)
        for i, value in zip(leaves, values, strict=True):
            args[i] = value
        return _tuple(test.function(*args, **sample.kwargs))[0]

    with ms_ops.backend(**{op: backend}):
        assert torch.autograd.gradcheck(outputs, tuple(leaves.values()))


def check_custom_op(op: str, sample: Sample, backend: str) -> None:
    """Run torch's own checks of the schema, autograd registration, fakes and tracing."""
    operator = DEFINED[op]
    args = (*operator.definition.prepare(*_leaves(sample), **dict(sample.kwargs)), backend)
    op_call: Any = operator.forward_op
    torch.library.opcheck(op_call, args)


def check_fake(op: str, sample: Sample, backend: str) -> None:
    """Compare shape, stride, dtype and device of fake and real outputs and gradients."""
    test = OPERATORS[op]
    with ms_ops.backend(**{op: backend}):
        real = _run(test.function, sample)
        with FakeTensorMode() as mode:
            fakes = [mode.from_tensor(a) if isinstance(a, Tensor) else a for a in sample.args]
            kwargs = {
                k: mode.from_tensor(a) if isinstance(a, Tensor) else a
                for k, a in sample.kwargs.items()
            }
            fake = _run(
                test.function, Sample(sample.name, tuple(fakes), kwargs, sample.differentiable)
            )
    for (name, mine), (_, other) in zip(real, fake, strict=True):
        for what in ("shape", "dtype", "device"):
            assert getattr(mine, what) == getattr(other, what), f"{op} {sample.name} {name} {what}"
        assert check_significant_strides(mine, other)[0], f"{op} {sample.name} {name} stride"


def check_compiled(
    op: str, many: Sequence[Sample], backend: str, compiler: str = "aot_eager"
) -> None:
    """Compile once with dynamic shapes and no graph break, then compare with eager on samples."""
    test = OPERATORS[op]
    torch._dynamo.reset()
    with ms_ops.backend(**{op: backend}):
        compiled = torch.compile(test.function, fullgraph=True, dynamic=True, backend=compiler)
        for sample in many:
            eager, traced = _run(test.function, sample), _run(compiled, sample)
            for (name, mine), (_, other) in zip(eager, traced, strict=True):
                where = f"{op}[{backend}] compiled {sample.name} {name}"
                truth = mine.to(torch.float64)
                assert_close("E2", where, other, truth, None, _input_dtype(sample))


def check_deterministic(op: str, sample: Sample, backend: str) -> None:
    """Run twice and compare bit by bit."""
    test = OPERATORS[op]
    with ms_ops.backend(**{op: backend}):
        first, second = _run(test.function, sample), _run(test.function, sample)
    for (name, mine), (_, other) in zip(first, second, strict=True):
        assert torch.equal(mine, other), f"{op}[{backend}] {sample.name} {name}: two runs differ"


def check_errors(op: str, backend: str) -> None:
    """Check that every error sample raises its exception with its message."""
    test = OPERATORS[op]
    for sample in test.errors():
        with ms_ops.backend(**{op: backend}):
            try:
                test.function(*sample.args, **sample.kwargs)
            except sample.kind as error:
                text = str(error)
                assert text.startswith(f"{op}: "), f"{sample.name}: {text!r}"
                assert sample.message in text, f"{sample.name}: {text!r}"
            else:
                raise AssertionError(f"{op}[{backend}] {sample.name}: did not raise")


def check_backend(
    op: str, backend: str, device: str = "cpu", dtypes: Sequence[torch.dtype] = DTYPES
) -> int:
    """Run every check of an operator on a backend; return how many checks ran."""
    count = 0
    for dtype in dtypes:
        for sample in OPERATORS[op].samples(dtype, device):
            for check in (check_values, check_fake, check_deterministic):
                check(op, sample, backend)
                count += 1
            if dtype is torch.float64 and is_small(sample):
                check_gradients(op, sample, backend)
                count += 1
    for name in OPERATORS[op].traced:
        sample = find_sample(op, name, torch.float32, device)
        check_custom_op(op, sample, backend)
        check_compiled(op, [sample], backend)
        count += 2
    check_errors(op, backend)
    return count + 1


def is_small(sample: Sample) -> bool:
    """Say whether finite differences over the sample take well under a second."""
    return sum(a.numel() for a in sample.args if isinstance(a, Tensor)) <= 800


def _reference(op: str) -> Callable[..., Any]:
    forward = registry.kernel(op, "reference").forward
    prepare = DEFINED[op].definition.prepare

    def run(*args: Any, **kwargs: Any) -> Any:
        return forward(*prepare(*args, **kwargs))

    return run


def _input_dtype(sample: Sample) -> torch.dtype:
    dtype: torch.dtype = sample.args[0].dtype
    return dtype


def _cast(sample: Sample, dtype: torch.dtype) -> Sample:
    args = (a.to(dtype) if isinstance(a, Tensor) else a for a in sample.args)
    return Sample(sample.name, tuple(args), sample.kwargs, sample.differentiable)


def _tuple(outputs: Any) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def _leaves(sample: Sample) -> list[Any]:
    args = list(sample.args)
    for i in sample.differentiable:
        args[i] = args[i].detach().requires_grad_()
    return args


def _run(function: Callable[..., Any], sample: Sample) -> list[tuple[str, Tensor]]:
    """Return named outputs and gradients for a random output gradient.

    The gradient is random and dense: that of a sum is a stride-0 tensor of ones, which hides
    and triggers defects of its own.
    """
    args = _leaves(sample)
    outputs = _tuple(function(*args, **sample.kwargs))
    generator = torch.Generator().manual_seed(7)
    shape = [int(n) for n in outputs[0].shape]
    dy = torch.randn(shape, generator=generator, dtype=torch.float64)
    # Rounded through the coarsest dtype, so that every precision gets the very same gradient.
    dy = dy.bfloat16().to(outputs[0].dtype).to(outputs[0].device)
    leaves = [args[i] for i in sample.differentiable]
    grads = torch.autograd.grad(outputs[0], leaves, dy)
    named = [(f"output {i}", out.detach()) for i, out in enumerate(outputs)]
    return named + [(f"grad {i}", g) for i, g in zip(sample.differentiable, grads, strict=True)]
