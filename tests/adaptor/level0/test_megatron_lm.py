"""What Megatron-LM's scripts need, without Megatron-LM: its parser, its helpers, its stubs."""

import os
import shutil
import subprocess
import sys
import textwrap
import warnings
from argparse import ArgumentParser, Namespace
from importlib.metadata import distribution
from pathlib import Path
from types import ModuleType

import pytest

import mindspeed
from mindspeed.features.level0 import megatron_lm


def parser():
    def add(given):
        given.add_argument("--transformer-impl", default="transformer_engine")
        given.add_argument(
            "--no-masked-softmax-fusion", dest="masked_softmax_fusion", action="store_false"
        )
        return given

    return megatron_lm.wrap_add_arguments(add)(ArgumentParser(allow_abbrev=False))


def test_defaults_ask_for_nothing_that_is_not_installed():
    args = parser().parse_args([])
    assert args.transformer_impl == "local"
    assert args.masked_softmax_fusion is False
    assert args.gradient_accumulation_fusion is False


def test_an_explicit_flag_wins():
    args = parser().parse_args(["--transformer-impl", "transformer_engine"])
    assert args.transformer_impl == "transformer_engine"


def test_validation_activates_the_features_of_the_validated_arguments(monkeypatch):
    seen = []
    monkeypatch.setattr(mindspeed, "activate", seen.append)

    def validate(args, defaults):
        args.seen = defaults
        return args

    args = Namespace(seen=None)
    assert megatron_lm.wrap_validate(validate)(args, {"a": 1}) is args
    assert seen == [args]
    assert args.seen == {"a": 1}


def test_the_stub_without_triton_says_what_is_missing():
    stub = megatron_lm.without_triton("megatron.x")
    assert not stub.is_batch_invariant_mode_enabled()
    with pytest.raises(RuntimeError, match="pip install triton"):
        stub.enable_batch_invariant_mode()


BUILD = """
    import sys
    from mindspeed.features.level0.dataset_helpers import compile_helpers
    compile_helpers()
    compile_helpers()
    import numpy
    from megatron.core.datasets import helpers_cpp
    dataset, sample = numpy.zeros(4, "int16"), numpy.zeros(4, "int64")
    helpers_cpp.build_blending_indices(dataset, sample, numpy.array([0.5, 0.5]), 2, 4, False)
    print(helpers_cpp.__file__)
    print(dataset.tolist(), sample.tolist())
"""


@pytest.fixture
def checkout(tmp_path):
    """A megatron.core.datasets that holds the source of the helpers and nothing built."""
    folder = tmp_path / "megatron/core/datasets"
    folder.mkdir(parents=True)
    for package in (folder.parent.parent, folder.parent, folder):
        (package / "__init__.py").write_text("")
    (source,) = (file for file in distribution("megatron-core").files if file.name == "helpers.cpp")
    shutil.copy(str(source.locate()), folder)
    return folder


def build(cwd, **env):
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(BUILD)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, **env},
        timeout=300,
    )


@pytest.mark.skipif(not (shutil.which("c++") or shutil.which("g++")), reason="no C++ compiler")
def test_the_helpers_are_built_for_this_interpreter_once(checkout):
    root = checkout.parents[2]
    first = build(root)
    assert first.returncode == 0, first.stderr
    file, indices = first.stdout.splitlines()
    assert Path(file).parent == checkout
    assert indices == "[0, 1, 0, 1] [0, 0, 1, 1]"
    changed = Path(file).stat().st_mtime_ns
    assert build(root).returncode == 0
    assert Path(file).stat().st_mtime_ns == changed
    assert sorted(p.name for p in checkout.iterdir() if "helpers_cpp" in p.name) == [
        Path(file).name
    ]


def test_without_a_compiler_it_says_what_to_install(checkout):
    done = build(checkout.parents[2], PATH=str(checkout))
    assert done.returncode
    assert "no C++ compiler found; install g++" in done.stderr


def test_a_failing_compiler_is_quoted(checkout):
    compiler = checkout / "c++"
    compiler.write_text("#!/bin/sh\necho broken toolchain >&2\nexit 1\n")
    compiler.chmod(0o755)
    done = build(checkout.parents[2], PATH=str(checkout))
    assert done.returncode
    assert "broken toolchain" in done.stderr


@pytest.mark.parametrize(("saved", "warned"), [(256, True), (128, False)])
def test_another_padded_vocabulary_is_warned_about(saved, warned, monkeypatch):
    training = ModuleType("megatron.training")
    training.get_args = lambda: Namespace(padded_vocab_size=128)
    monkeypatch.setitem(sys.modules, "megatron.training", training)
    seen = []
    check = megatron_lm.wrap_check_checkpoint(seen.append)
    args = Namespace(padded_vocab_size=saved)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check(args)
    assert seen == [args]
    assert [f"padded to {saved} entries" in str(w.message) for w in caught] == [True] * warned
