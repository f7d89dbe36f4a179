"""Run a benchmark, or all of a folder: `python -m benchmarks [NAME | FOLDER [OPTIONS...]]`.

Without a name, list them.
"""

import ast
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def drivers():
    """Path of every benchmark by name; the file beside them that only helps has no main."""
    files = sorted(HERE.glob("*/**/*.py"))
    return {
        path.relative_to(HERE).with_suffix("").as_posix(): path
        for path in files
        if '__name__ == "__main__"' in path.read_text(encoding="utf-8")
    }


def main(argv):
    known = drivers()
    folder = [name for name in known if argv and name.startswith(f"{argv[0]}/")]
    if folder:
        return max(run(known[name], argv[1:], name) for name in folder)
    if not argv or argv[0] not in known:
        for name, path in known.items():
            summary = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
            print(f"{name:24} {summary.splitlines()[0] if summary else ''}")
        if argv:
            print(f"no benchmark is named {argv[0]!r}; choose one of these", file=sys.stderr)
        return 2 if argv else 0
    return run(known[argv[0]], argv[1:])


def run(path, options, title=""):
    if title:
        print(f"== {title}", flush=True)
    return subprocess.call([sys.executable, str(path), *options])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
