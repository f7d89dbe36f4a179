"""`mindspeed profile` where ms-profile is not installed: its help, its usage, its advice."""

import subprocess
import sys

import pytest

WITHOUT = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("ms_profile", "megatron", "torch"):
            raise ModuleNotFoundError("blocked: " + name, name=name)
sys.meta_path.insert(0, Blocked())
from mindspeed.cli import main
sys.exit(main({argv!r}))
"""


@pytest.mark.parametrize(
    ("argv", "status", "word"),
    [
        (["profile", "--help"], 0, "--picture"),
        (["--help"], 0, "sum up a profile"),
        (["profile", "."], 1, "pip install 'mindspeed[profile]'"),
        (["profile"], 2, "required: RUN_DIR"),
        (["profile", ".", "--max-size", "many"], 2, "'many' is not a size"),
        (["profile", "a", "b", "c"], 2, "one or two runs"),
    ],
)
def test_without_the_package(argv, status, word):
    code = WITHOUT.format(argv=argv)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == status
    assert word in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
