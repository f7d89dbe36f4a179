"""How an operator becomes a torch.library custom op.

A differentiable operator is two functional custom ops, `ms::<op>` and `ms::<op>_backward`, whose
last argument names the backend (empty: choose inside, which is what a trace does). In eager mode
a call is one dispatcher op with its own autograd formula. Under torch.compile the ops dissolve
into what the backend runs, so that the compiler fuses it with its neighbours.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.functional_tensor import FunctionalTensorMode

from . import registry
from .flops import state_flops
from .registry import Facts

NAMESPACE = "ms"

# Arguments that a schema marks as written into: `Tensor(a!) acc`, `Tensor(a!)[] params`.
_WRITTEN = re.compile(r"Tensor\(\w+!\)(?:\[\])? (\w+)")


@dataclass(frozen=True, kw_only=True)
class OpDef:
    """The parts of an operator.

    The schemas leave out the trailing backend argument. `facts` takes the forward op's arguments,
    `backward_facts` the backward op's. `fake` and `backward_fake` return outputs of the exact
    shape, stride and dtype. `save(ctx, inputs, output)` and `grad(ctx, *grads)` are the autograd
    formula; `grad` calls the backward op through `Operator.backward`. `prepare` takes the public
    function's arguments, checks them and returns those of the forward op. `flops` and
    `backward_flops` count matrix products (see `ms_ops.flops`); None says that there are none.

    An operator without derivative leaves out all that backward needs; its tensors must not require
    gradients. One that writes into an argument marks it in the schema (`Tensor(a!) acc`) and
    returns nothing. `opaque` keeps the op whole under torch.compile: its kernels read the values
    of a tensor to know what to launch, which no trace can.
    """

    name: str
    family: str
    prepare: Callable[..., tuple[Any, ...]]
    schema: str
    facts: Callable[..., Facts]
    fake: Callable[..., Any]
    flops: Callable[..., int] | None
    backward_schema: str | None = None
    backward_facts: Callable[..., Facts] | None = None
    backward_fake: Callable[..., Any] | None = None
    save: Callable[..., None] | None = None
    grad: Callable[..., Any] | None = None
    backward_flops: Callable[..., int] | None = None
    opaque: bool = False


@dataclass(frozen=True)
class Operator:
    """A registered operator: `op(*args)` runs it, `op.backward(*args, backend)` its backward."""

    definition: OpDef
    forward_op: Callable[..., Any]
    backward_op: Callable[..., Any] | None

    def __call__(self, *args: Any) -> Any:
        """Run the forward op on the backend chosen now."""
        if torch.compiler.is_compiling():
            return self.forward_op(*args, "")
        name = registry.choose(self.definition.name, self.definition.facts(*args))
        return self.forward_op(*args, name)

    def backward(self, *args: Any) -> Any:
        """Run the backward op; the last argument is the backend, empty to choose one."""
        assert self.backward_op is not None, f"{self.definition.name} has no derivative"
        return self.backward_op(*args)


OPERATORS: dict[str, Operator] = {}


def define_op(definition: OpDef) -> Operator:
    """Register the custom ops of an operator with fakes, autograd and the transparent rule."""
    name = definition.name
    registry.register_operator(name, definition.family)
    forward = _custom_op(
        name,
        definition.schema,
        _body(name, "forward", definition.facts),
        definition.fake,
        definition.opaque,
    )
    packet = getattr(getattr(torch.ops, NAMESPACE), name)
    state_flops(packet, definition.flops)
    OPERATORS[name] = Operator(definition, packet.default, _define_backward(definition, forward))
    return OPERATORS[name]


def _define_backward(definition: OpDef, forward: Any) -> Callable[..., Any] | None:
    if definition.backward_schema is None:
        return None
    assert definition.backward_facts is not None
    assert definition.backward_fake is not None
    assert definition.grad is not None
    name = f"{definition.name}_backward"
    _custom_op(
        name,
        definition.backward_schema,
        _body(definition.name, "backward", definition.backward_facts),
        definition.backward_fake,
        definition.opaque,
    )
    forward.register_autograd(definition.grad, setup_context=definition.save)
    packet = getattr(getattr(torch.ops, NAMESPACE), name)
    state_flops(packet, definition.backward_flops)
    overload: Callable[..., Any] = packet.default
    return overload


def _body(op: str, direction: str, facts: Callable[..., Facts]) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        *inputs, name = args
        name = name or registry.choose(op, facts(*inputs))
        return getattr(registry.kernel(op, name), direction)(*inputs)

    return run


def _custom_op(
    name: str, schema: str, body: Callable[..., Any], fake: Callable[..., Any], opaque: bool
) -> Any:
    arguments, returns = schema.split(" -> ")
    full = f"{arguments[:-1]}, str backend) -> {returns}"
    written = _WRITTEN.findall(arguments)
    op = torch.library.custom_op(f"{NAMESPACE}::{name}", body, mutates_args=written, schema=full)
    op.register_fake(lambda *args: fake(*args[:-1]))
    if opaque:
        return op

    def dissolve(
        mode: Any, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        with mode:
            return body(*args)

    op.register_torch_dispatch(FunctionalTensorMode, dissolve)
    return op
