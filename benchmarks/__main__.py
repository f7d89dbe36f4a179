"""Run one benchmark by its name, or list them: `python -m benchmarks [NAME [OPTIONS...]]`."""

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
    if not argv or argv[0] not in known:
        for name, path in known.items():
            summary = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
            print(f"{name:24} {summary.splitlines()[0] if summary else ''}")
        if argv:
            print(f"no benchmark is named {argv[0]!r}; choose one of these", file=sys.stderr)
        return 2 if argv else 0
    return subprocess.call([sys.executable, str(known[argv[0]]), *argv[1:]])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
