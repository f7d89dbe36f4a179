"""The test body of the operators that communicate.

Every rank makes the arguments of all ranks, runs its own call for real, and compares it with a
simulation of all ranks in one process, in fp64: outputs and all gradients. An argument or result
that several ranks hold alike is one tensor in the simulation, so that its gradient is that of all.

    for sample in OPERATORS["matmul_all_reduce"].samples(sizes, torch.float32, "cpu"):
        check_ranks("matmul_all_reduce", sample, groups, rank, "portable")
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed import ProcessGroup

import ms_ops

from .body import _Returned, poisoned_empty
from .tolerance import CAP, E1, assert_close, max_error

Arguments = Mapping[str, "Tensor | None"]
Outputs = Sequence[tuple[Tensor, ...]]


@dataclass(frozen=True)
class CommSample:
    """One call: the tensors of each rank by the argument's name, and the options of all."""

    name: str
    ranks: tuple[Arguments, ...]
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class CommTest:
    """How one operator is tested.

    Attributes:
        name: the operator's registered name.
        function: the public function that is called.
        groups: the names of its group arguments: one of all ranks, or the one of consecutive ranks
            and the one across.
        samples: `samples(sizes, dtype, device)` yields calls; sizes are those of the groups, inner
            first, 1 for one that the operator does not have.
        simulate: `simulate(ranks, sizes, **options)` returns the outputs of each rank in plain
            torch.
        outputs: tolerance class of each output.
        mutates: the argument that is written into and returned first, whose gradient is not asked.
    """

    name: str
    function: Callable[..., Any]
    groups: tuple[str, ...]
    samples: Callable[[tuple[int, int], torch.dtype, str], Iterator[CommSample]]
    simulate: Callable[..., Outputs]
    outputs: tuple[str, ...]
    mutates: str | None = None


def check_ranks(
    test: CommTest,
    sample: CommSample,
    groups: Sequence[ProcessGroup],
    sizes: tuple[int, int],
    rank: int,
    backend: str,
) -> None:
    """Compare this rank's outputs and gradients with the simulation of all ranks.

    Args:
        test: the operator's test.
        sample: one of its samples.
        groups: this rank's groups, as `test.groups` names them.
        sizes: sizes of the inner and the outer group.
        rank: this rank among all.
        backend: which backend.

    Raises:
        AssertionError: a tensor is outside of its tolerance class.
    """
    exact, plain = (simulated(test, sample, sizes, dtype) for dtype in (torch.float64, None))
    with poisoned_empty(), ms_ops.backend(**{test.name: backend}):
        got = run_rank(test, sample, groups, sizes, rank)
    assert got.keys() == exact[rank].keys(), f"{test.name} {sample.name}: outputs differ"
    inputs = next(t.dtype for t in sample.ranks[rank].values() if t is not None)
    for name, mine in got.items():
        what, _, place = name.partition(" ")
        kind = test.outputs[int(place)] if what == "output" else "MG"
        where = f"{test.name}[{backend}] {sample.name} {mine.dtype} {name}, rank {rank}"
        if kind == "X":
            assert_close("X", where, mine.cpu(), exact[rank][name], None, inputs)
            continue
        pairs = zip(plain, exact, strict=True)
        other = max(max_error(p[name], e[name]) for p, e in pairs)
        cap = CAP[inputs] * (len(sample.ranks) + 1) * (2 if kind == "MG" else 1)
        _assert_sum(where, mine.cpu(), exact[rank][name], other, cap, E1[inputs].atol)


def check_fake_rank(
    test: CommTest,
    sample: CommSample,
    groups: Sequence[ProcessGroup],
    rank: int,
    backend: str,
) -> None:
    """Compare shape, stride and dtype of what our custom ops return, fake and real.

    Raises:
        AssertionError: they differ.
    """
    where = f"{test.name}[{backend}] {sample.name}, rank {rank}"
    with ms_ops.backend(**{test.name: backend}):
        with _Returned() as real:
            forward_and_backward(test, sample.ranks[rank], sample.options, groups)
        with FakeTensorMode() as mode, _Returned() as fake:
            given = sample.ranks[rank].items()
            fakes = {k: t if t is None else mode.from_tensor(t) for k, t in given}
            forward_and_backward(test, fakes, sample.options, groups)
    for (name, mine), (_, other) in zip(real.tensors, fake.tensors, strict=True):
        for what in ("shape", "dtype", "device"):
            got, need = getattr(mine, what), getattr(other, what)
            assert got == need, f"{where}: {name} {what} {got}, of the fake {need}"
        for tensor in (mine, other):
            assert tensor.is_contiguous(), f"{where}: {name} is not contiguous"


def forward_and_backward(
    test: CommTest, given: Arguments, options: Mapping[str, Any], groups: Sequence[ProcessGroup]
) -> None:
    """Make one rank's call, and run its backward."""
    leaves, run = _leaves(test, given)
    outputs = _tuple(test.function(**run, **_named(test, groups), **options))
    if leaves:
        grads = [torch.ones_like(out) for out in outputs]
        torch.autograd.grad(outputs, list(leaves.values()), grads)


def _assert_sum(
    where: str, got: Tensor, exact: Tensor, plain: float, cap: float, floor: float
) -> None:
    """Judge a sum of all ranks' parts: each is rounded before it travels, and bias is one more.

    Its error is at most twice the largest that plain torch makes on any rank, and under a cap that
    grows with the number of parts.
    """
    assert got.shape == exact.shape, f"{where}: shape {got.shape}, need {exact.shape}"
    if not exact.numel():
        return
    error, top = max_error(got, exact), exact.abs().max().item()
    assert error <= cap * top + floor, f"{where}: error {error:.3g} above the cap {cap * top:.3g}"
    if got.dtype is not torch.float64:
        twice = 2 * plain + floor
        assert error <= twice, f"{where}: error {error:.3g}, twice plain torch's is {twice:.3g}"


def run_rank(
    test: CommTest,
    sample: CommSample,
    groups: Sequence[ProcessGroup],
    sizes: tuple[int, int],
    rank: int,
) -> dict[str, Tensor]:
    """Run this rank's call; return outputs, and gradients for the simulation's output gradients."""
    leaves, run = _leaves(test, sample.ranks[rank])
    outputs = _tuple(test.function(**run, **_named(test, groups), **sample.options))
    named = {f"output {i}": out.detach() for i, out in enumerate(outputs)}
    if not leaves:
        return named
    shapes = simulated_outputs(test, sample, sizes)
    noise = _noise(shapes)
    grads = [noise[id(out)] for out in shapes[rank]]
    grads = [
        g.to(out.dtype).to(out.device).view(out.shape)
        for g, out in zip(grads, outputs, strict=True)
    ]
    found = torch.autograd.grad(outputs, list(leaves.values()), grads)
    return named | {f"grad {name}": g for name, g in zip(leaves, found, strict=True)}


def simulated(
    test: CommTest, sample: CommSample, sizes: tuple[int, int], dtype: torch.dtype | None
) -> list[dict[str, Tensor]]:
    """Return named outputs and gradients of all ranks, in `dtype` or that of the sample."""
    made: dict[int, Tensor] = {}

    def leaf(tensor: Tensor | None) -> Tensor | None:
        if tensor is None or not tensor.is_floating_point():
            return None if tensor is None else tensor.cpu()
        if id(tensor) not in made:
            mine = tensor.detach().cpu().to(dtype or tensor.dtype, copy=True)
            made[id(tensor)] = mine.requires_grad_(test.mutates is None)
        return made[id(tensor)]

    ranks = [{name: leaf(t) for name, t in given.items()} for given in sample.ranks]
    outputs = test.simulate(ranks, sizes, **sample.options)
    results = [{f"output {i}": o.detach() for i, o in enumerate(mine)} for mine in outputs]
    if test.mutates is not None:
        return results
    noise = _noise(outputs)
    unique = {id(o): o for mine in outputs for o in mine}
    grads = torch.autograd.grad(
        list(unique.values()),
        list(made.values()),
        [noise[i].to(o.dtype) for i, o in unique.items()],
    )
    of = {id(tensor): grad for tensor, grad in zip(made.values(), grads, strict=True)}
    for mine, given in zip(results, ranks, strict=True):
        mine |= {f"grad {name}": of[id(t)] for name, t in given.items() if id(t) in of}
    return results


def simulated_outputs(test: CommTest, sample: CommSample, sizes: tuple[int, int]) -> Outputs:
    """Return the outputs of all ranks in fp64; what several ranks hold alike is one tensor."""
    ranks = [
        {k: None if t is None else _wide(t.detach().cpu()) for k, t in given.items()}
        for given in sample.ranks
    ]
    return test.simulate(ranks, sizes, **sample.options)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def _leaves(test: CommTest, given: Arguments) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return what is differentiated, and the arguments of one call."""
    run: dict[str, Any] = {}
    leaves = {}
    for name, tensor in given.items():
        run[name] = tensor
        if tensor is None or not tensor.is_floating_point():
            continue
        if test.mutates is None:
            run[name] = leaves[name] = tensor.detach().requires_grad_()
        elif name == test.mutates:
            run[name] = tensor.clone()
    return leaves, run


def _named(test: CommTest, groups: Sequence[ProcessGroup]) -> dict[str, ProcessGroup]:
    return dict(zip(test.groups, groups, strict=True))


def _noise(outputs: Outputs) -> dict[int, Tensor]:
    """Return a random dense gradient for each output, the same on every rank."""
    generator = torch.Generator().manual_seed(11)
    noise: dict[int, Tensor] = {}
    for mine in outputs:
        for out in mine:
            if id(out) not in noise:
                wide = torch.randn(out.shape, generator=generator, dtype=torch.float64)
                # Rounded through the coarsest dtype: every precision gets the same gradient.
                noise[id(out)] = wide.bfloat16().double()
    return noise


def _tuple(outputs: Any) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)
