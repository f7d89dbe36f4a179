"""The shared interception: who hears what, in which phase, in which module."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from ms_profile import modules
from ms_profile.tap import Meter, module, phase, unmetered

MM = torch.ops.aten.mm.default


class Log(Meter):
    """Phase and module of each matrix product."""

    watches_modules = True

    def opened(self):
        self.seen = []

    def after(self, func, args, kwargs, out):
        if func in (MM, torch.ops.aten.addmm.default):
            self.seen.append((phase(), module()))
        return out

    def count(self, name):
        return sum(each == name for each, _ in self.seen)


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x @ x

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad @ x.t() + x.t() @ grad


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(4, 4)
        self.down = nn.Linear(4, 4)

    def forward(self, x):
        return self.down(self.up(x).relu())


@pytest.fixture
def x():
    return torch.randn(4, 4, requires_grad=True)


def test_phases_of_plain_autograd(x):
    with Log() as log:
        y = x @ x
        y.sum().backward()
        with torch.no_grad():
            x @ x
    assert [each for each, _ in log.seen] == ["forward", "backward", "backward", "other"]


@pytest.mark.parametrize("reentrant", [True, False])
def test_phases_of_a_checkpoint_with_a_custom_function(x, reentrant):
    with Log() as log:
        y = checkpoint(lambda x: Square.apply(x) @ x, x, use_reentrant=reentrant)
        assert (log.count("forward"), len(log.seen)) == (2, 2)
        y.sum().backward()
    # Without reentrance recomputation stops as soon as the last saved tensor is there.
    assert log.count("recompute") == (2 if reentrant else 1)
    assert log.count("backward") == 4
    assert log.count("other") == 0


@pytest.mark.parametrize("reentrant", [None, True, False])
def test_modules_of_forward_backward_and_recomputation(x, reentrant):
    block = Block()
    with Log() as log:
        y = block(x) if reentrant is None else checkpoint(block, x, use_reentrant=reentrant)
        y.sum().backward()
    expected = {"forward": ["Block.up", "Block.down"], "backward": ["Block.down"] * 2}
    expected["backward"] += ["Block.up"] * 2
    assert [m for p, m in log.seen if p == "forward"] == expected["forward"]
    assert [m for p, m in log.seen if p == "backward"] == expected["backward"]
    again = [m for p, m in log.seen if p == "recompute"]
    assert again == {None: [], True: expected["forward"], False: expected["forward"][:1]}[reentrant]


def test_a_module_that_raises_leaves_no_trace_in_the_stack(x):
    class Broken(nn.Module):
        def forward(self, x):
            raise ArithmeticError

    with Log() as log:
        with pytest.raises(ArithmeticError):
            nn.Sequential(nn.Linear(4, 4), Broken())(x)
        x @ x
    assert log.seen[-1] == ("forward", "")


def test_meters_share_one_mode_and_end_in_any_order(x):
    first, second = Log(), Log()
    first.__enter__()
    before = torch._C._len_torch_dispatch_stack()
    second.__enter__()
    assert torch._C._len_torch_dispatch_stack() == before
    x @ x
    first.__exit__(None, None, None)
    x @ x
    second.__exit__(None, None, None)
    x @ x
    assert (len(first.seen), len(second.seen)) == (1, 2)
    assert torch._C._len_torch_dispatch_stack() == before - 1


def test_entered_twice_or_never(x):
    log = Log()
    with log, pytest.raises(RuntimeError, match="is on already"):
        log.__enter__()
    with pytest.raises(RuntimeError, match="is not on"):
        log.__exit__(None, None, None)
    with log:
        x @ x
    assert len(log.seen) == 1


def test_left_before_a_mode_that_was_entered_later():
    class Other(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    log = Log()
    log.__enter__()
    with Other(), pytest.raises(RuntimeError, match="left before"):
        log.__exit__(None, None, None)
    log.__exit__(None, None, None)
    assert not log.is_on


def test_a_foreign_mode_between_two_meters_does_not_hide_operators(x):
    class Other(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    with Log() as outer, Other(), Log() as inner:
        x @ x
    assert (len(outer.seen), len(inner.seen)) == (1, 1)


def test_the_result_can_be_replaced(x):
    class Double(Meter):
        def after(self, func, args, kwargs, out):
            return out * 2 if func is MM else out

    with torch.no_grad():
        plain = x @ x
        with Double(), Double():
            twice = x @ x
    assert torch.equal(twice, plain * 4)


def test_inference_mode_takes_operators_apart(x):
    with torch.inference_mode(), Log() as log:
        F.linear(x, x)
    assert len(log.seen) == 1


def test_unmetered_work_is_not_heard(x):
    with Log() as log:
        with unmetered():
            x @ x
        x @ x
    assert len(log.seen) == 1


def test_hooks_of_modules_are_gone_afterwards(x):
    hooks = torch.nn.modules.module
    counts = len(hooks._global_forward_hooks), len(hooks._global_forward_pre_hooks)
    with Log(), Log():
        assert len(hooks._global_forward_hooks) == counts[0] + 1
    assert counts == (len(hooks._global_forward_hooks), len(hooks._global_forward_pre_hooks))
    assert modules.current() == ""


def test_an_error_while_opening_leaves_everything_off():
    class Broken(Meter):
        watches_modules = True

        def opened(self):
            raise ValueError("no")

    depth = torch._C._len_torch_dispatch_stack()
    meter = Broken()
    with pytest.raises(ValueError, match="no"):
        meter.__enter__()
    assert not meter.is_on
    assert torch._C._len_torch_dispatch_stack() == depth
    with pytest.raises(RuntimeError, match="not watched"):
        modules.unwatch()


@pytest.mark.parametrize("method", ["before", "after"])
def test_a_tolerant_meter_fails_alone(x, method, caplog):
    class Broken(Log):
        pass

    def fail(self, func, *rest):
        if func is MM:
            raise KeyError("no such thing")
        return rest[-1]

    setattr(Broken, method, fail)
    broken, well = Broken(), Log()
    with broken, pytest.raises(KeyError):
        x @ x
    broken.tolerant = True
    with broken, well:
        y = x @ x @ x
    assert torch.equal(y, x @ x @ x)
    assert isinstance(broken.failure, KeyError)
    assert len(well.seen) == 2
    assert [r.getMessage() for r in caplog.records] == [
        "Broken failed at aten.mm.default and is switched off: KeyError('no such thing')"
    ]
    with broken:
        assert broken.failure is None


def test_gradients_are_bitwise_the_same(x):
    torch.manual_seed(0)
    block = Block()
    block(x).sum().backward()
    plain = [p.grad.clone() for p in block.parameters()]
    block.zero_grad()
    with Log():
        block(x).sum().backward()
    assert all(torch.equal(a, p.grad) for a, p in zip(plain, block.parameters(), strict=True))
