"""The one test body: what any backend of any operator has to pass.

Each check takes (operator, sample, backend) and raises AssertionError with the tensor's name;
those that compare with something costly take several backends.
`check_backend` runs all of them; a backend from elsewhere proves itself by that call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._prims_common import check_significant_strides
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import ms_ops

from .. import registry
from ..opdef import NAMESPACE
from ..opdef import OPERATORS as DEFINED
from .case import OpTest, Sample
from .cases import OPERATORS
from .tolerance import E1, assert_close, max_error, roundings

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def find_sample(op: str, name: str, dtype: torch.dtype, device: str = "cpu") -> Sample:
    """Return one sample of an operator by name."""
    return next(s for s in OPERATORS[op].samples(dtype, device) if s.name == name)


@contextmanager
def poisoned_empty() -> Iterator[None]:
    """Fill what torch.empty and its relatives return with NaN, so that an unwritten place shows."""
    before = torch.are_deterministic_algorithms_enabled()
    mild = torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    # Filling is all that is wanted: an operator without a fixed order may run.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=mild)
        torch.utils.deterministic.fill_uninitialized_memory = filled  # type: ignore[attr-defined]


def declines(op: str, sample: Sample, backend: str) -> str | None:
    """Return why a backend does not take a sample, None when it does."""
    definition = DEFINED[op].definition
    facts = definition.facts(*definition.prepare(*sample.args, **sample.kwargs))
    return {v.backend: v.reason for v in registry.verdicts(op, facts)}[backend]


def check_values(op: str, sample: Sample, *backends: str) -> float:
    """Compare all outputs and all gradients with autograd through the fp64 reference on the CPU.

    Returns:
        The largest error of a tensor, in roundings of its own largest value.
    """
    test = OPERATORS[op]
    oracle = _run(test, _reference(op), _cast(sample, torch.float64))
    eager = _run(test, test.plain, sample)
    return max(_check_against(op, sample, backend, oracle, eager) for backend in backends)


def _check_against(
    op: str, sample: Sample, backend: str, oracle: dict[str, Tensor], eager: dict[str, Tensor]
) -> float:
    test = OPERATORS[op]
    dtype = _input_dtype(sample)
    with poisoned_empty(), ms_ops.backend(**{op: backend}):
        got = _run(test, test.function, sample)
    # A kernel returns an empty tensor where the public function returns None.
    same = got.keys() == eager.keys() and got.keys() <= oracle.keys()
    assert same, f"{op}[{backend}] {sample.name}: outputs differ"
    worst = 0.0
    for name, mine in got.items():
        where = f"{op}[{backend}] {sample.name} {dtype} {name}"
        kind = _kind(test, sample, name)
        assert_close(kind, where, mine.cpu(), oracle[name], eager[name].cpu(), dtype)
        # Where nearly all cancels, an error below the tolerance's absolute part means nothing.
        counts = mine.is_floating_point() and mine.dtype in E1
        if counts and max_error(mine.cpu(), oracle[name]) > E1[mine.dtype].atol:
            worst = max(worst, roundings(mine.cpu(), oracle[name]))
    return worst


def check_gradients(op: str, sample: Sample, backend: str, fast: bool = False) -> None:
    """Compare the backward with finite differences; the sample must be fp64.

    Args:
        op: the operator's name.
        sample: one of its samples.
        backend: the backend that runs.
        fast: differences along random directions, not along every axis.
    """
    test = OPERATORS[op]
    start, kwargs = _leaves(test, sample)
    leaves = {
        i: _at(start, kwargs, i).detach().clone().requires_grad_() for i in sample.differentiable
    }

    def outputs(*values: Tensor) -> tuple[Tensor, ...]:
        args, options = list(start), dict(kwargs)
        for i, value in zip(leaves, values, strict=True):
            _put(args, options, i, value)
        results = _outputs(test, test.function(*args, **options), args)
        return tuple(results[i] for i in _flowing(test, results))

    with ms_ops.backend(**{op: backend}):
        inputs = tuple(leaves.values())
        assert not leaves or torch.autograd.gradcheck(outputs, inputs, fast_mode=fast)


def check_custom_op(op: str, sample: Sample, backend: str, traced: bool = True) -> None:
    """Run torch's own checks of the schema, autograd registration, fakes and tracing.

    Args:
        op: the operator's name.
        sample: one of its samples.
        backend: the backend that runs.
        traced: also trace it with its derivative, which takes a second.
    """
    operator = DEFINED[op]
    args, kwargs = _leaves(OPERATORS[op], sample)
    prepared = (*operator.definition.prepare(*args, **kwargs), backend)
    op_call: Any = operator.forward_op
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    torch.library.opcheck(
        op_call, prepared, test_utils=[*checks, *["test_aot_dispatch_dynamic"] * traced]
    )


def check_fake(op: str, sample: Sample, *backends: str) -> None:
    """Compare shape, stride, dtype and device of what our custom ops return, fake and real."""
    test = OPERATORS[op]
    # The fake is the operator's, whatever the backend.
    with FakeTensorMode() as mode, ms_ops.backend(**{op: backends[0]}), _Returned() as fake:
        _run(test, test.function, _each_tensor(sample, mode.from_tensor))
    for backend in backends:
        with ms_ops.backend(**{op: backend}), _Returned() as real:
            _run(test, test.function, sample)
        for (name, mine), (_, other) in zip(real.tensors, fake.tensors, strict=True):
            where = f"{op}[{backend}] {sample.name} {name}"
            for what in ("shape", "dtype", "device"):
                assert getattr(mine, what) == getattr(other, what), f"{where} {what}"
            assert check_significant_strides(mine, other)[0], f"{where} stride"


def check_compiled(
    op: str, many: Sequence[Sample], backend: str, compiler: Any = "aot_eager"
) -> Callable[..., Any]:
    """Compile once with dynamic shapes and no graph break, then compare with eager on samples.

    Returns:
        The compiled function.
    """
    test = OPERATORS[op]
    torch._dynamo.reset()
    with ms_ops.backend(**{op: backend}):
        compiled = torch.compile(test.function, fullgraph=True, dynamic=True, backend=compiler)
        for sample in many:
            eager, traced = _run(test, test.function, sample), _run(test, compiled, sample)
            for name, mine in eager.items():
                where = f"{op}[{backend}] compiled {sample.name} {name}"
                kind = "E2" if mine.is_floating_point() else "X"
                truth = mine.to(torch.float64)
                assert_close(kind, where, traced[name], truth, None, _input_dtype(sample))
    return compiled


def check_deterministic(op: str, sample: Sample, backend: str) -> None:
    """Run twice and compare bit by bit."""
    test = OPERATORS[op]
    with ms_ops.backend(**{op: backend}):
        first, second = (_run(test, test.function, sample) for _ in range(2))
    for name, mine in first.items():
        same = torch.equal(mine, second[name])
        assert same, f"{op}[{backend}] {sample.name} {name}: two runs differ"


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
    """Run every check of an operator on what a backend takes; return how many checks ran."""
    count = 0
    for dtype in dtypes:
        for sample in OPERATORS[op].samples(dtype, device):
            if declines(op, sample, backend):
                continue
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


def is_small(sample: Sample, numel: int = 800) -> bool:
    """Say whether finite differences over the sample take well under a second."""
    if not sample.differentiable:
        return False
    return sum(a.numel() for a in sample.args if isinstance(a, Tensor)) <= numel


class _Returned(TorchDispatchMode):
    """Keeps what our custom ops return, before autograd casts a gradient to its input's dtype."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.tensors: list[tuple[str, Tensor]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.namespace == NAMESPACE:
            named = [(f"{func} output {i}", t) for i, t in enumerate(_tuple(out))]
            self.tensors += [(name, t) for name, t in named if t is not None]
        return out


def _reference(op: str) -> Callable[..., Any]:
    forward = registry.kernel(op, "reference").forward
    prepare = DEFINED[op].definition.prepare

    def run(*args: Any, **kwargs: Any) -> Any:
        return forward(*prepare(*args, **kwargs))

    return run


def _input_dtype(sample: Sample) -> torch.dtype:
    dtype: torch.dtype = sample.args[0].dtype
    return dtype


def _kind(test: OpTest, sample: Sample, name: str) -> str:
    """Return the tolerance class of a tensor that `_run` has named."""
    what, _, place = name.partition(" ")
    if what == "output":
        kind = test.outputs[int(place)]
    else:
        kind = test.gradients[int(place) if place.isdigit() else place]
    return "E2" if kind == "E1" and sample.kwargs.get("casting") == "llama" else kind


def _each_tensor(sample: Sample, change: Callable[[Tensor], Tensor]) -> Sample:
    args = (change(a) if isinstance(a, Tensor) else a for a in sample.args)
    kwargs = {k: change(a) if isinstance(a, Tensor) else a for k, a in sample.kwargs.items()}
    return Sample(sample.name, tuple(args), kwargs, sample.differentiable)


def _cast(sample: Sample, dtype: torch.dtype) -> Sample:
    return _each_tensor(sample, lambda a: a.cpu().to(dtype) if a.is_floating_point() else a.cpu())


def _tuple(outputs: Any) -> tuple[Any, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def _at(args: list[Any], kwargs: dict[str, Any], place: int | str) -> Tensor:
    tensor: Tensor = kwargs[place] if isinstance(place, str) else args[place]
    return tensor


def _put(args: list[Any], kwargs: dict[str, Any], place: int | str, value: Tensor) -> None:
    if isinstance(place, str):
        kwargs[place] = value
    else:
        args[place] = value


def _leaves(test: OpTest, sample: Sample) -> tuple[list[Any], dict[str, Any]]:
    """Return the arguments of one call: leaves where differentiated, copies where written into."""
    args, kwargs = list(sample.args), dict(sample.kwargs)
    for i in sample.differentiable:
        _put(args, kwargs, i, _at(args, kwargs, i).detach().requires_grad_())
    for i in test.mutates:
        args[i] = None if args[i] is None else args[i].clone()
    return args, kwargs


def _outputs(test: OpTest, result: Any, args: list[Any]) -> tuple[Any, ...]:
    """Return the outputs of one call; for a kernel that writes in place what it wrote into."""
    return tuple(args[i] for i in test.mutates) if result is None else _tuple(result)


def _flowing(test: OpTest, outputs: tuple[Any, ...]) -> list[int]:
    """Return the places of the outputs that gradients flow back from."""
    there = [i for i in test.differentiable_outputs if outputs[i] is not None]
    return [i for i in there if outputs[i].requires_grad]


def _run(test: OpTest, function: Callable[..., Any], sample: Sample) -> dict[str, Tensor]:
    """Return named outputs, and gradients for random output gradients.

    Those are random and dense: the gradient of a sum is a stride-0 tensor of ones, which hides
    and triggers defects of its own.
    """
    args, kwargs = _leaves(test, sample)
    outputs = _outputs(test, function(*args, **kwargs), args)
    named = {f"output {i}": o.detach() for i, o in enumerate(outputs) if o is not None}
    if not sample.differentiable:
        return named
    generator = torch.Generator().manual_seed(7)
    flowing = [outputs[i] for i in _flowing(test, outputs)]
    leaves = [_at(args, kwargs, i) for i in sample.differentiable]
    grads = torch.autograd.grad(flowing, leaves, [_noise(out, generator) for out in flowing])
    return named | {f"grad {i}": g for i, g in zip(sample.differentiable, grads, strict=True)}


def _noise(like: Tensor, generator: torch.Generator) -> Tensor:
    shape = [int(n) for n in like.shape]
    if isinstance(like, FakeTensor):  # draws slowly what it then does not hold
        return torch.empty(shape, dtype=like.dtype, device=like.device)
    wide = torch.randn(shape, generator=generator, dtype=torch.float64)
    # Rounded through the coarsest dtype, so that every precision gets the very same gradient.
    return wide.bfloat16().to(like.dtype).to(like.device)
