"""The import hook in fresh processes: scope, order, cache, undo."""

import contextlib
import io
import os
import sys
import textwrap

import pytest

from mindspeed.device import describe
from support.ranks import run_ranks


def run_code(rank, world_size, code, cwd, writes_bytecode):
    """Run code as a script in `cwd`; returns what it printed."""
    os.chdir(cwd)
    sys.path.insert(0, str(cwd))
    sys.dont_write_bytecode = not writes_bytecode
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "<script>", "exec"), {"__name__": "__main__"})
    return printed.getvalue().strip()


def python(code, cwd=".", writes_bytecode=False, **env):
    """Run code in a process that has imported torch and neither Megatron nor mindspeed."""
    return run_ranks(
        run_code, 1, textwrap.dedent(code), cwd, writes_bytecode, backend=None, env=env, timeout=120
    )[0]


@pytest.fixture
def fake_megatron(tmp_path):
    """A package named megatron with one rewritten and one plain module."""
    package = tmp_path / "megatron"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "uses.py").write_text("import torch\nwhere = 'cuda'\ndef f(): return 'cuda'\n")
    (package / "plain.py").write_text("x = 1\n")
    return tmp_path


def test_names_that_are_no_device_are_refused():
    with pytest.raises(ValueError, match=r"'tpu'.*one of cpu, npu, cuda"):
        describe("tpu")


def test_the_environment_variable_chooses(monkeypatch):
    monkeypatch.setenv("MS_DEVICE", "cpu")
    assert describe().type == "cpu"
    assert "MS_DEVICE" in describe().because
    monkeypatch.setenv("MS_DEVICE", "gpu")
    with pytest.raises(ValueError, match="MS_DEVICE"):
        describe()


def test_an_npu_without_torch_npu_says_so():
    with pytest.raises(RuntimeError, match="torch_npu cannot be imported"):
        describe("npu")


def test_only_megatron_sees_the_device(fake_megatron):
    (fake_megatron / "other.py").write_text("where = 'cuda'\nimport torch; t = torch.cuda\n")
    out = python(
        """
        import torch
        seen = torch, torch.cuda, torch.distributed
        kept = {n: id(v) for m in seen for n, v in vars(m).items()}
        tensor_type, cuda = torch.Tensor.type, torch.Tensor.cuda
        import mindspeed.device as d
        print(d.install("cpu").backend)
        import megatron.uses, other
        print(megatron.uses.where, megatron.uses.f(), other.where, other.t is torch.cuda)
        print(torch.cuda.is_available(), torch.Tensor.type is tensor_type)
        print(torch.Tensor.cuda is cuda)
        now = {n: id(v) for m in seen for n, v in vars(m).items()}
        print({n for n in kept if kept[n] != now.get(n)})
        """,
        cwd=fake_megatron,
    )
    assert out.splitlines() == ["gloo", "cpu cpu cuda True", "False True", "True", "set()"]


def test_installing_twice_is_one_installation_and_uninstalling_gives_cuda_back(fake_megatron):
    out = python(
        """
        import sys, mindspeed.device as d
        before = list(sys.meta_path)
        first = d.install("cpu")
        assert d.install() is first and len(sys.meta_path) == len(before) + 1
        import megatron.uses as m
        d.uninstall(); d.uninstall()
        assert sys.meta_path == before and d.current() is None
        print(m.f())
        d.install("cpu")
        print(m.f())
        """,
        cwd=fake_megatron,
    )
    assert out.split() == ["cuda", "cpu"]


def test_another_device_needs_the_first_to_go(fake_megatron):
    out = python(
        """
        import mindspeed.device as d
        d.install("cpu")
        try: d.install("cuda")
        except RuntimeError as e: print(e)
        """,
        cwd=fake_megatron,
    )
    assert "'cpu' is installed, got 'cuda'" in out


def test_megatron_imported_before_is_named(fake_megatron):
    out = python(
        """
        import megatron.plain, megatron.uses, mindspeed.device as d
        try: d.install("cpu")
        except RuntimeError as e: print(e)
        """,
        cwd=fake_megatron,
    )
    assert "before Megatron" in out
    assert out.endswith("already imported: megatron.uses")


def test_on_cuda_nothing_is_installed(fake_megatron):
    out = python(
        """
        import sys, megatron.uses, mindspeed.device as d
        before = list(sys.meta_path)
        d.install("cuda")
        print(sys.meta_path == before, megatron.uses.f(), d.report().places)
        """,
        cwd=fake_megatron,
    )
    assert out == "True cuda {}"


REWRITES = """
    import mindspeed.device.finder as f, mindspeed.device as d
    calls = []
    rewrite = f.rewrite
    f.rewrite = lambda *a: calls.append(a[1]) or rewrite(*a)
    d.install("cpu")
    import megatron.uses, megatron.plain
    print(len(calls), megatron.uses.f(), megatron.uses.__spec__.loader.get_source("megatron.uses")
          == open(megatron.uses.__file__).read())
"""


def test_rewritten_code_is_cached_beside_pythons_own(fake_megatron):
    run = {"cwd": fake_megatron, "writes_bytecode": True}
    assert python(REWRITES, **run) == "1 cpu True"
    assert python(REWRITES, **run) == "0 cpu True"
    cached = {path.name for path in (fake_megatron / "megatron/__pycache__").iterdir()}
    tag = f"cpython-{sys.version_info.major}{sys.version_info.minor}"
    assert f"uses.{tag}.opt-mindspeed1.pyc" in cached
    assert f"uses.{tag}.pyc" not in cached
    assert f"plain.{tag}.pyc" in cached
    source = fake_megatron / "megatron/uses.py"
    source.write_text(source.read_text() + "# longer\n")
    assert python(REWRITES, **run) == "1 cpu True"


def test_without_a_place_to_write_there_is_no_cache(fake_megatron):
    # The cache folder's name is taken by a file: not writable, also for root.
    (fake_megatron / "megatron/__pycache__").write_text("")
    run = {"cwd": fake_megatron, "writes_bytecode": True}
    before = sorted(fake_megatron.rglob("*"))
    assert python(REWRITES, HOME=str(fake_megatron), **run) == "1 cpu True"
    assert python(REWRITES, HOME=str(fake_megatron), **run) == "1 cpu True"
    assert sorted(fake_megatron.rglob("*")) == before


def test_python_without_bytecode_files_has_no_cache_of_ours(fake_megatron):
    assert python(REWRITES, cwd=fake_megatron) == "1 cpu True"
    assert not (fake_megatron / "megatron/__pycache__").exists()


def test_user_code_compiles_while_the_device_layer_is_on():
    out = python(
        """
        import torch, mindspeed.device as d
        d.install("cpu")
        import megatron.core.fusions.fused_bias_swiglu as swiglu
        f = torch.compile(lambda x: x.sin() + 1, fullgraph=True, backend="aot_eager")
        x = torch.ones(2, 4, requires_grad=True)
        print(torch.equal(f(x), x.sin() + 1), torch.cuda.is_available())
        swiglu.bias_swiglu_impl(x, None).sum().backward()
        print(x.grad.shape == x.shape)
        """
    )
    assert out.splitlines() == ["True False", "True"]


def test_importing_the_device_package_has_no_effect():
    code = """
        import sys; path = list(sys.meta_path)
        import mindspeed.device
        print(sys.meta_path == path, "megatron" in sys.modules, "torch_npu" in sys.modules)
    """
    assert python(code) == "True False False"


def test_the_report_names_rewritten_places(fake_megatron):
    out = python(
        """
        import mindspeed.device as d
        d.install("cpu")
        import megatron.uses
        print(d.report().places)
        """,
        cwd=fake_megatron,
    )
    assert out == "{'megatron.uses': {'K2': 2}}"


def test_triton_modules_are_told_there_is_no_cuda():
    out = python(
        """
        import mindspeed.device as d
        d.install("cpu")
        import megatron.core.fusions.fused_indices_converter as f
        from megatron.core import utils
        print(f._mindspeed_device.cuda.is_available(), utils._mindspeed_device.cuda.is_available())
        print(f._mindspeed_device.cuda.current_device())
        """
    )
    assert out.split() == ["False", "True", "cpu"]


FAKE_TORCH_NPU = """
import torch, types
torch.npu = types.ModuleType("torch.npu")
torch.npu.is_available = lambda: True
torch.npu.current_device = lambda: 3
"""


def test_an_npu_is_found_and_answers_through_torch_npu(fake_megatron):
    """A stand-in for torch_npu: what is checked is the choice and the routing, not the NPU."""
    (fake_megatron / "torch_npu.py").write_text(FAKE_TORCH_NPU)
    (fake_megatron / "megatron/names.py").write_text(
        "import torch\n"
        "from torch.cuda import is_current_stream_capturing\n"
        "backend, kind, where = 'nccl', 'torch.cuda.HalfTensor', f'cuda:{1}'\n"
        "index = torch.cuda.current_device()\n"
        "pin = dict(pin_memory=True)\n"
    )
    out = python(
        """
        import mindspeed.device as d
        print(d.install(), d.report().fallthrough)
        import megatron.names as m
        print(m.backend, m.kind, m.where, m.index, m.pin, d.report().fallthrough)
        """,
        cwd=fake_megatron,
    )
    first, second = out.splitlines()
    assert "type='npu', backend='hccl', pin=True" in first
    assert second == (
        "hccl torch.npu.HalfTensor npu:1 3 {'pin_memory': True} "
        "{'is_current_stream_capturing': 'megatron.names'}"
    )
