"""`mindspeed run` and spawned children: Megatron works where the script never names mindspeed."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

SCRIPT = """
import json, multiprocessing, os, pathlib, sys
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker  # needs the device layer


class Message:  # defined in the main script: the child finds it only if it re-runs the script
    def __init__(self, text):
        self.text = text


def in_child(message, path):
    import megatron.core.pipeline_parallel.schedules
    import torch
    from mindspeed import device
    found = {"argv": sys.argv, "text": message.text, "device": device.current().type,
             "main": __name__, "cuda": torch.cuda.is_available()}
    pathlib.Path(path).write_text(json.dumps(found))


if __name__ == "__main__":
    out, methods = sys.argv[1:]
    rank = os.environ.get("RANK", "0")
    context = multiprocessing.get_context(methods.split("-")[int(rank)])
    child = context.Process(target=in_child, args=(Message("hello"), f"{out}/child-{rank}.json"))
    child.start()
    child.join()
    here = {"argv": sys.argv, "file": __file__, "path": sys.path[0], "exit": child.exitcode,
            "world": os.environ.get("WORLD_SIZE"), "tracker": callable(get_cuda_rng_tracker)}
    pathlib.Path(out, f"main-{rank}.json").write_text(json.dumps(here))
"""

RUN = "import sys; from mindspeed.launch import main; sys.exit(main(sys.argv[1:]))"


def launch(*argv: object, cwd=None, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", RUN, *map(str, argv)],
        capture_output=True,
        text=True,
        timeout=180,
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", "MS_DEVICE": "cpu", **env},
    )


def read(path) -> dict:
    return json.loads(path.read_text())


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "scripts" / "unedited.py"
    path.parent.mkdir()
    path.write_text(SCRIPT)
    return path


def check_child(found: dict, argv: list[str]) -> None:
    assert found["device"] == "cpu"
    assert found["text"] == "hello"
    assert found["argv"] == argv
    assert found["cuda"] is False  # outside megatron torch stays honest, in children too


def test_two_processes_and_children_of_each_start_method(script, tmp_path):
    done = launch("--nproc-per-node", 2, script, tmp_path, "spawn-forkserver")
    assert done.returncode == 0, done.stderr
    argv = [str(script), str(tmp_path), "spawn-forkserver"]
    for rank in (0, 1):
        main = read(tmp_path / f"main-{rank}.json")
        assert main["argv"] == argv
        assert main["exit"] == 0
        assert main["world"] == "2"
        assert main["path"] == str(script.parent)
        assert main["file"] == str(script)
        child = read(tmp_path / f"child-{rank}.json")
        check_child(child, argv)
        assert child["main"] == "__mp_main__"


def test_module_instead_of_a_file(script, tmp_path):
    done = launch("-m", "unedited", tmp_path, "spawn", cwd=script.parent)
    assert done.returncode == 0, done.stderr
    assert read(tmp_path / "main-0.json")["file"] == str(script)
    check_child(read(tmp_path / "child-0.json"), [str(script), str(tmp_path), "spawn"])


def test_one_line_import_reaches_children_without_our_launcher(tmp_path):
    script = tmp_path / "edited.py"
    script.write_text("import mindspeed.megatron_adaptor\n" + SCRIPT)
    done = subprocess.run(
        [sys.executable, script, tmp_path, "spawn"],
        capture_output=True,
        text=True,
        timeout=180,
        env={**os.environ, "MS_DEVICE": "cpu"},
    )
    assert done.returncode == 0, done.stderr
    check_child(read(tmp_path / "child-0.json"), [str(script), str(tmp_path), "spawn"])


def test_failing_script_fails_the_command(tmp_path):
    script = tmp_path / "bad.py"
    script.write_text("raise RuntimeError('the script itself is wrong')\n")
    done = launch(script)
    assert done.returncode == 1
    assert "the script itself is wrong" in done.stderr


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["missing.py"], "no file 'missing.py'"),
        (["--no-python", "missing.py"], "--no-python is not supported"),
        (["--run-path", "missing.py"], "--run-path is not supported"),
    ],
)
def test_bad_command_line(argv, message, tmp_path):
    done = launch(*argv, cwd=tmp_path)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_help_names_our_command():
    done = launch("--help")
    assert done.returncode == 0
    assert done.stdout.startswith("usage: mindspeed run ")
    assert "--nproc-per-node" in done.stdout


def test_propagation_is_reversible():
    code = """
from multiprocessing import spawn
from mindspeed import processes
original = spawn.get_preparation_data
processes.propagate(); processes.propagate()
assert processes.propagating() and spawn.get_preparation_data is not original
assert processes.KEY in spawn.get_preparation_data("child")
processes.stop()
assert spawn.get_preparation_data is original and not processes.propagating()
processes.stop()
processes.propagate()
spawn.get_preparation_data = lambda name: {}
try:
    processes.stop()
except RuntimeError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "undo that first" in done.stdout
