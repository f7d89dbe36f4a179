"""Each kind of place, one by one, and all places of the installed megatron-core."""

import json
from collections import Counter
from importlib.metadata import distribution
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mindspeed.device.descriptor import Descriptor
from mindspeed.device.lookup import Lookup
from mindspeed.device.rewrite import NAME, count_places, needs_rewrite, rewrite

pytestmark = pytest.mark.megatron014

# Places by kind in all of megatron.core; a new version shows its changes here.
KNOWN = json.loads(Path(__file__).with_name("places.json").read_text())
NPU = Descriptor("npu", "hccl", pin=True, because="test")
CPU = Descriptor("cpu", "gloo", pin=False, because="test")


def fake(descriptor):
    memory = SimpleNamespace(MemPool="pool")
    return Lookup(descriptor, SimpleNamespace(sync=lambda: "synced", memory=memory))


def run(source, descriptor=NPU, **names):
    """Execute rewritten source; returns its globals and the kinds of its places."""
    tree, counts = rewrite(source)
    scope = {NAME: fake(descriptor), "torch": torch, **names}
    exec(compile(tree, "<test>", "exec"), scope)
    return scope, set(counts)


@pytest.mark.parametrize(
    ("source", "expected", "kind"),
    [
        ("r = torch.cuda.sync()", "synced", "K1"),
        ("def f(g=torch.cuda.sync): return g()\nr = f()", "synced", "K1"),
        ("r = 'cuda'", "npu", "K2"),
        ("r = {'cuda': 1}['npu']", 1, "K2"),
        ("match 'npu':\n    case 'cuda': r = 1\n    case _: r = 2", 1, "K2"),
        ("r = 'cuda:3'", "npu:3", "K3"),
        ("i = 2\nr = f'cuda:{i}!'", "npu:2!", "K3"),
        ("from torch.cuda import sync as s\nr = s()", "synced", "K6"),
        ("import torch.cuda.memory as m\nr = m.MemPool", "pool", "K6"),
        ("from torch.cuda.memory import MemPool\nr = MemPool", "pool", "K6"),
        ("r = dict(pin_memory=True)['pin_memory']", True, "K7"),
        ("r = 'torch.cuda.HalfTensor'", "torch.npu.HalfTensor", "K8"),
        ("r = 'nccl'", "hccl", "K9"),
    ],
)
def test_each_kind_answers_for_the_device(source, expected, kind):
    scope, kinds = run(source)
    assert scope["r"] == expected
    assert kinds == {kind}


@pytest.mark.parametrize(
    "source",
    [
        '"""Runs on cuda."""\nr = __doc__',
        "r = 'cuda_rng_state'",
        "r = 'use_nccl_ub'",
        "r = 'not cuda'",
        "x = 'a'\nr = f'{x} cuda:'",
        "r = dict(pin_memory=False)",
        "import torch.backends.cuda as b\nr = b",
    ],
)
def test_other_names_stay(source):
    scope, kinds = run(source)
    plain = {}
    exec(source, plain)
    assert scope["r"] == plain["r"]
    assert not kinds


def test_a_docstring_that_is_exactly_a_literal_stays():
    assert run('def f():\n    "cuda"\nr = f.__doc__')[0]["r"] == "cuda"


def test_moving_a_tensor_and_asking_where_it_is():
    tree, counts = rewrite(
        "a = x.cuda()\nb = x.cuda(0, non_blocking=True)\nc = x.is_cuda\nd = x.pin_memory()"
    )
    runtime = SimpleNamespace(current_device=lambda: torch.device("cpu"))
    x = torch.ones(2)
    scope = {NAME: Lookup(CPU, runtime), "x": x}
    exec(compile(tree, "<test>", "exec"), scope)
    assert set(counts) == {"K4", "K5", "K7"}
    assert torch.equal(scope["a"], x)
    assert torch.equal(scope["b"], x)
    assert scope["c"] is True
    assert scope["d"] is x


def test_switched_off_a_move_gets_the_arguments_that_were_written():
    tree, _ = rewrite("a = module.cuda()\nb = tensor.cuda(1, non_blocking=True)")
    lookup = fake(CPU)
    lookup.turn_off()
    module = SimpleNamespace(cuda=lambda device=None: ("module", device))
    tensor = SimpleNamespace(cuda=lambda device, non_blocking: ("tensor", device, non_blocking))
    scope = {NAME: lookup, "module": module, "tensor": tensor}
    exec(compile(tree, "<test>", "exec"), scope)
    assert scope["a"] == ("module", None)
    assert scope["b"] == ("tensor", 1, True)


def test_a_missing_name_is_the_import_error_that_callers_catch():
    source = "try:\n    from torch.cuda import nothing\nexcept ImportError as e:\n    r = e.name"
    assert run(source)[0]["r"] == "torch.cuda"


def test_switched_off_it_answers_as_written():
    tree, _ = rewrite("def f():\n    return 'cuda', 'nccl', torch.cuda, 'torch.cuda.FloatTensor'")
    lookup = fake(NPU)
    scope = {NAME: lookup, "torch": torch}
    exec(compile(tree, "<test>", "exec"), scope)
    assert scope["f"]()[:2] == ("npu", "hccl")
    lookup.turn_off()
    assert scope["f"]() == ("cuda", "nccl", torch.cuda, "torch.cuda.FloatTensor")
    lookup.turn_on()
    assert scope["f"]()[:2] == ("npu", "hccl")


def test_positions_are_those_of_the_original():
    tree, _ = rewrite("x = 1\n\ny = torch.cuda.missing\n")
    with pytest.raises(AttributeError) as error:
        exec(compile(tree, "source.py", "exec"), {NAME: fake(NPU)})
    assert error.traceback[-1].lineno + 1 == 3


def megatron_sources():
    files = distribution("megatron-core").files or []
    return sorted(str(f) for f in files if f.suffix == ".py" and f.parts[0] == "megatron")


def test_no_place_is_left_in_any_module_of_megatron_core():
    dist, total, touched = distribution("megatron-core"), Counter(), 0
    for name in megatron_sources():
        source = Path(str(dist.locate_file(name))).read_bytes()
        if not needs_rewrite(source):
            assert not rewrite(source)[1], name
            continue
        tree, counts = rewrite(source, name)
        # NPU and CPU run the same tree: nothing of it may name CUDA again.
        left = count_places(tree)
        assert not left, f"{name}: {left}"
        total += counts
        touched += bool(counts)
    assert {"files": touched, **dict(sorted(total.items()))} == KNOWN[dist.version]
