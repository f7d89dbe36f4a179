"""How results are judged: equality where the arithmetic is the same, a rule where it rounds.

The rule: the error to the fp64 reference is at most twice that of the plain torch path in the
same dtype. It needs no tolerance chosen by hand and cannot be met by a wrong result that happens
to be near.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

FACTOR = 2.0


def error(actual: torch.Tensor, exact: torch.Tensor) -> float:
    """Largest absolute difference to the fp64 reference; NaN and infinity count as infinite.

    Raises:
        AssertionError: The shapes differ.
    """
    assert actual.shape == exact.shape, f"shape {tuple(actual.shape)}, not {tuple(exact.shape)}"
    if exact.numel() == 0:
        return 0.0
    if not torch.isfinite(actual).all():
        return float("inf")
    return float((actual.detach().double() - exact.detach().double()).abs().max())


def rounding_unit(exact: torch.Tensor, dtype: torch.dtype) -> float:
    """Error of rounding the largest value of `exact` once to `dtype`: no result can do better."""
    if exact.numel() == 0:
        return 0.0
    return 0.5 * torch.finfo(dtype).eps * float(exact.detach().abs().max())


def assert_near_plain(
    actual: torch.Tensor,
    plain: torch.Tensor,
    exact: torch.Tensor,
    name: str = "result",
    factor: float = FACTOR,
) -> None:
    """Assert the rule for one tensor.

    Args:
        actual: Result under test, any floating dtype.
        plain: Result of plain torch in the same dtype and shape.
        exact: fp64 reference of the same shape.
        name: What the message calls it.
        factor: How many times the plain error is allowed.
    """
    assert exact.dtype == torch.float64, f"{name}: the reference is {exact.dtype}, not float64"
    assert actual.dtype == plain.dtype, f"{name}: dtype {actual.dtype}, plain {plain.dtype}"
    ours, theirs = error(actual, exact), error(plain, exact)
    bound = max(factor * theirs, rounding_unit(exact, plain.dtype))
    assert ours <= bound, (
        f"{name}: error {ours:.3e} to fp64, plain torch has {theirs:.3e}, allowed {bound:.3e}"
    )


def assert_equal(actual: torch.Tensor, expected: torch.Tensor, name: str = "result") -> None:
    """Assert the same dtype, shape and values, bit for bit except that NaN equals NaN."""
    assert actual.dtype == expected.dtype, f"{name}: {actual.dtype}, not {expected.dtype}"
    assert actual.shape == expected.shape, (
        f"{name}: shape {tuple(actual.shape)}, not {tuple(expected.shape)}"
    )
    if torch.equal(_bits(actual), _bits(expected)):
        return
    both_nan = torch.isnan(actual) & torch.isnan(expected)
    different = (_bits(actual) != _bits(expected)) & ~both_nan
    if different.any():
        at = tuple(different.nonzero()[0].tolist())
        raise AssertionError(
            f"{name}: {int(different.sum())} of {different.numel()} values differ, first at {at}: "
            f"{actual[at].item()!r}, not {expected[at].item()!r}"
        )


def assert_all_equal(
    actual: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]
) -> None:
    """`assert_equal` for every entry of two mappings with the same keys."""
    assert actual.keys() == expected.keys(), (
        f"names differ: {sorted(actual.keys() ^ expected.keys())}"
    )
    for name in expected:
        assert_equal(actual[name], expected[name], name)


def outputs_and_gradients(
    fn: Callable[..., torch.Tensor | tuple[torch.Tensor, ...]],
    inputs: Sequence[torch.Tensor],
    cotangents: Sequence[torch.Tensor] | None = None,
    dtype: torch.dtype | None = None,
) -> dict[str, torch.Tensor]:
    """Run `fn` and its backward pass: {"out0": .., "grad0": ..} for all outputs and inputs.

    Args:
        fn: Function of tensors; its outputs are a tensor or a tuple of them.
        inputs: Its tensors; floating ones get a gradient. They are copied.
        cotangents: Gradient of each floating output; ones where not given.
        dtype: Floating inputs and cotangents are cast to it first (float64 for the reference).
    """
    leaves = [_leaf(tensor, dtype) for tensor in inputs]
    out = fn(*leaves)
    outs = out if isinstance(out, tuple) else (out,)
    floating = [tensor for tensor in outs if tensor.requires_grad]
    if cotangents is None:
        cotangents = [torch.ones_like(tensor) for tensor in floating]
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    grads = torch.autograd.grad(
        floating,
        wanted,
        [c.to(tensor.dtype) for c, tensor in zip(cotangents, floating, strict=True)],
        allow_unused=True,
    )
    found = {f"out{i}": tensor.detach() for i, tensor in enumerate(outs)}
    numbers = [i for i, leaf in enumerate(leaves) if leaf.requires_grad]
    for i, grad in zip(numbers, grads, strict=True):
        assert grad is not None, f"input {i} got no gradient"
        found[f"grad{i}"] = grad
    return found


def assert_losses_close(
    actual: Sequence[float], expected: Sequence[float], tolerance: float, name: str = "losses"
) -> None:
    """Assert that two loss curves have the same length and differ nowhere by more."""
    assert len(actual) == len(expected), f"{name}: {len(actual)} steps, not {len(expected)}"
    for step, (a, b) in enumerate(zip(actual, expected, strict=True)):
        assert abs(a - b) <= tolerance, (
            f"{name}: step {step}: {a!r}, not {b!r} (difference {abs(a - b):.3e}, "
            f"allowed {tolerance:.1e})"
        )


def _leaf(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    if not tensor.is_floating_point():
        return tensor
    cast = tensor.detach().to(dtype) if dtype is not None else tensor.detach()
    return cast.clone().requires_grad_()


_INTEGER_OF_SIZE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """The values as integers, so that 0.0 and -0.0 differ."""
    tensor = tensor.detach().contiguous()
    if not tensor.is_floating_point():
        return tensor
    return tensor.view(_INTEGER_OF_SIZE[tensor.element_size()])
