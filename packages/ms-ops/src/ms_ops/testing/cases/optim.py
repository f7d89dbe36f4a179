"""Tests of the optim family."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import ms_ops

from ..case import ErrorSample, Make, OpTest, Sample, maker

DTYPES = (torch.float32, torch.float64)
SHAPE = (6, 5)
# Far from the defaults, so that each number shows in one step.
RATES = {"lr": 0.1, "beta1": 0.8, "beta2": 0.9, "eps": 1e-3, "weight_decay": 0.2}


def _state(make: Make, *shape: int) -> tuple[Tensor, ...]:
    """Return weights, gradients and moments."""
    return make(*shape), make(*shape), make(*shape) * 0.1, make(*shape).square() + 0.1


def _step(number: int, device: str) -> Tensor:
    return torch.tensor([number], device=device)


def adamw_samples(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    """Yield calls of `fused_adamw_`."""
    if dtype not in DTYPES:
        return
    make = maker(dtype, device)

    def call(name: str, *shape: int, amsgrad: bool = False, **kwargs: Any) -> Sample:
        largest = make(*shape).square() if amsgrad else None
        args = (*_state(make, *shape), _step(3, device), largest)
        return Sample(name, args, {**RATES, **kwargs}, ())

    yield call("plain", *SHAPE)
    yield call("large", 33, 21)
    yield call("penalty", *SHAPE, mode=0)
    yield call("uncorrected", *SHAPE, bias_correction=False)
    yield call("uncorrected_penalty", *SHAPE, bias_correction=False, mode=0, maximize=True)
    yield call("amsgrad", *SHAPE, amsgrad=True)
    yield call("amsgrad_uncorrected", *SHAPE, amsgrad=True, bias_correction=False)
    yield call("maximize", *SHAPE, maximize=True, mode=0)
    yield call("no_decay_of_moments", *SHAPE, beta1=0.0, beta2=0.0)
    yield call("empty", 0, 4)
    yield call("number")
    turned = tuple(t.t() for t in _state(make, *SHAPE))
    yield Sample("turned", (*turned, _step(1, device), None), RATES, ())
    first, count = _state(make, *SHAPE), torch.tensor(1.0, device=device)
    yield Sample("defaults", (*first, count, None), {}, ())


def ema_samples(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    """Yield calls of `fused_ema_adamw_`."""
    if dtype not in DTYPES:
        return
    make = maker(dtype, device)

    def call(name: str, *shape: int, **kwargs: Any) -> Sample:
        args = (*_state(make, *shape), make(*shape), _step(3, device))
        return Sample(name, args, {**RATES, "ema_decay": 0.7, **kwargs}, ())

    yield call("plain", *SHAPE)
    yield call("large", 33, 21)
    yield call("penalty", *SHAPE, mode=0)
    yield call("uncorrected", *SHAPE, bias_correction=False)
    yield call("fast_average", *SHAPE, ema_decay=0.2)
    yield call("frozen_average", *SHAPE, ema_decay=1.0)
    yield call("empty", 0, 4)
    turned = tuple(t.t() for t in (*_state(make, *SHAPE), make(*SHAPE)))
    yield Sample("turned", (*turned, _step(1, device)), {**RATES, "ema_decay": 0.7}, ())


def adamw_errors() -> Iterator[ErrorSample]:
    """Yield calls of `fused_adamw_` that must raise."""
    p, g, m, v = _state(maker(torch.float32, "cpu"), *SHAPE)
    step = _step(1, "cpu")
    yield from _errors((p, g, m, v), (step,))
    yield ErrorSample(
        "largest", (p, g, m, v, step, v[1:]), ValueError, "max_exp_avg_sqs: got (5, 5), need (6, 5)"
    )
    yield ErrorSample("step_number", (p, g, m, v, 1), TypeError, "step: got int, need a torch.T")
    yield ErrorSample(
        "step_dtype", (p, g, m, v, step.bool()), TypeError, "step: got torch.bool, need one of int"
    )
    yield ErrorSample(
        "steps", (p, g, m, v, step.expand(2)), ValueError, "step: got (2,), need one element"
    )


def ema_errors() -> Iterator[ErrorSample]:
    """Yield calls of `fused_ema_adamw_` that must raise."""
    p, g, m, v = _state(maker(torch.float32, "cpu"), *SHAPE)
    ema, step = p.clone(), _step(1, "cpu")
    yield from _errors((p, g, m, v), (ema, step))
    yield ErrorSample(
        "average", (p, g, m, v, ema.double(), step), TypeError, "emas: got torch.float64, need"
    )
    for decay in (-0.1, 1.1):
        yield ErrorSample(
            f"decay_{decay}",
            (p, g, m, v, ema, step),
            ValueError,
            f"ema_decay: got {decay}, need a number in [0, 1]",
            {"ema_decay": decay},
        )


def _errors(state: tuple[Tensor, ...], rest: tuple[Tensor, ...]) -> Iterator[ErrorSample]:
    p, g, m, v = state

    def call(
        name: str, args: tuple[object, ...], kind: type[Exception], message: str
    ) -> ErrorSample:
        return ErrorSample(name, (*args, *rest), kind, message)

    low = (p.half(), g.half(), m.half(), v.half())
    yield call("low", low, TypeError, "params: got torch.float16, need one of float32, float64")
    yield call("mixed", (p, g.double(), m, v), TypeError, "grads: got torch.float64, need")
    yield call("text", ("p", g, m, v), TypeError, "params: got str, need a torch.Tensor or a list")
    yield call("item", (p, [1.0], m, v), TypeError, "grads: got float, need a torch.Tensor")
    yield call("none", ([], [], [], []), ValueError, "params: got an empty list")
    yield call("length", (p, [g, g], m, v), ValueError, "grads: got 2 tensors, need 1, as of par")
    yield call("shape", (p, g, m[1:], v), ValueError, "exp_avgs: got (5, 5), need (6, 5), of par")
    yield call("device", (p, g.to("meta"), m, v), RuntimeError, "need all tensors on one device")
    for name, value, need in (
        ("lr", -0.1, "0 or more"),
        ("eps", float("nan"), "0 or more"),
        ("weight_decay", -1.0, "0 or more"),
        ("beta1", 1.0, "a number in [0, 1)"),
        ("beta2", -0.5, "a number in [0, 1)"),
        ("mode", 2, "one of 0, 1"),
    ):
        message = f"{name}: got {value}, need {need}"
        yield ErrorSample(name, (*state, *rest), ValueError, message, {name: value})


def plain_adamw(
    p: Tensor, g: Tensor, m: Tensor, v: Tensor, step: Tensor, largest: Tensor | None, **kwargs: Any
) -> tuple[Tensor | None, ...]:
    """Take the step as torch.optim writes it for one tensor."""
    given = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0, **kwargs}
    g = -g if given.get("maximize") else g
    if given.get("mode", 1):
        p.mul_(1 - given["lr"] * given["weight_decay"])
    else:
        g = g + given["weight_decay"] * p
    m.lerp_(g, 1 - given["beta1"])
    v.mul_(given["beta2"]).addcmul_(g, g, value=1 - given["beta2"])
    root = v.sqrt() if largest is None else torch.maximum(largest, v, out=largest).sqrt()
    first, second = 1.0, 1.0
    if given.get("bias_correction", True):
        first, second = (1 - given[beta] ** step.item() for beta in ("beta1", "beta2"))
    p.addcdiv_(m, (root / second**0.5).add_(given["eps"]), value=-given["lr"] / first)
    return p, m, v, largest


def plain_ema_adamw(
    p: Tensor,
    g: Tensor,
    m: Tensor,
    v: Tensor,
    ema: Tensor,
    step: Tensor,
    *,
    ema_decay: float,
    **kwargs: Any,
) -> tuple[Tensor, ...]:
    """Take the step, then average."""
    plain_adamw(p, g, m, v, step, None, **kwargs)
    return p, m, v, ema.mul_(ema_decay).add_(p, alpha=1 - ema_decay)


def _test(
    function: Callable[..., Any], samples: Any, errors: Any, plain: Any, mutates: tuple[int, ...]
) -> OpTest:
    # All tensors grow together; the largest second moments, in place 5, are absent.
    grows = dict.fromkeys((0, 1, *(place for place in mutates if place in (2, 3, 4))), 0)
    return OpTest(
        name=function.__name__,
        function=function,
        samples=samples,
        errors=errors,
        plain=plain,
        outputs=("E1",) * 4,
        gradients={},
        traced=("plain",),
        resized=("plain", "large"),
        grows=grows,
        mutates=mutates,
    )


TESTS = (
    _test(ms_ops.fused_adamw_, adamw_samples, adamw_errors, plain_adamw, (0, 2, 3, 5)),
    _test(ms_ops.fused_ema_adamw_, ema_samples, ema_errors, plain_ema_adamw, (0, 2, 3, 4)),
)
