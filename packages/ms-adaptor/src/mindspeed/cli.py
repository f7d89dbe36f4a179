"""The `mindspeed` command. Nothing here imports torch or Megatron; `train` and `run` may."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mindspeed import __version__
from mindspeed.patching.errors import PatchError, PlanError

OK, PROBLEM, USAGE = 0, 1, 2

# Commands that own their whole command line.
DELEGATED = {
    "train": ("mindspeed.train.cli", "train a GPT on real text, level against level"),
    "run": ("mindspeed.launch", "start a Megatron script under this project, torchrun's options"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0 good, 1 a problem was found, 2 wrong usage."""
    args = list(sys.argv[1:] if argv is None else argv)
    if args and args[0] in DELEGATED:
        return _delegate(args[0], args[1:])
    own, megatron = _split(args)
    options = _parser().parse_args(own)
    if options.command is None:
        _parser().print_help()
        return USAGE
    options.megatron_args = megatron
    run: Callable[[argparse.Namespace], int] = options.run
    try:
        return run(options)
    except PlanError as error:
        return _fail(options.command, str(error), PROBLEM)
    except (PatchError, ValueError, OSError) as error:
        return _fail(options.command, str(error), USAGE)


def _fail(command: str, text: str, status: int) -> int:
    print(f"mindspeed {command}: {text}", file=sys.stderr)
    return status


def _delegate(command: str, argv: list[str]) -> int:
    module = DELEGATED[command][0]
    try:
        found: Any = importlib.import_module(module)
    except ModuleNotFoundError as error:
        advice = "pip install 'mindspeed[train]'"
        return _fail(command, f"{error.name} is not installed; {advice}", PROBLEM)
    return int(found.main(argv) or 0)


def _split(argv: list[str]) -> tuple[list[str], list[str]]:
    at = argv.index("--") if "--" in argv else len(argv)
    return argv[:at], argv[at + 1 :]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mindspeed",
        description="Megatron-LM on CPU, Ascend NPU and CUDA, by levels of optimization.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", metavar="command")
    for name, (_, text) in DELEGATED.items():
        commands.add_parser(name, help=text, add_help=False)
    for name, run, text in _COMMANDS:
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(run=run)
        command.add_argument("--json", action="store_true", help="machine-readable output")
        if name in _OPTIONS:
            _OPTIONS[name](command)
    return parser


def _plan_options(command: argparse.ArgumentParser) -> None:
    command.usage = "mindspeed plan [options] -- [Megatron's arguments]"
    command.add_argument("--level", type=int, choices=(0, 1, 2), help="optimization level")
    command.add_argument("--device", default="auto", choices=("auto", "cpu", "npu", "cuda"))
    command.add_argument("--megatron", default="auto", help="version, wheel or checkout")


def _flags_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--markdown", action="store_true", help="the page docs/flags.md")
    command.add_argument("--status", choices=("kept", "native", "planned", "dropped"))


def _fingerprint_options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--from",
        dest="sources",
        action="append",
        required=True,
        metavar="PATH",
        help="wheel of megatron-core or checkout of Megatron-LM; several of one version add up",
    )
    command.add_argument("--out", type=Path, help="folder for the record, instead of our own")


def _run_plan(options: argparse.Namespace) -> int:
    from mindspeed import tables
    from mindspeed.features.arguments import parse_megatron
    from mindspeed.patching.plan import draft

    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always")
        config = parse_megatron(options.megatron_args, prog="mindspeed plan")
    for note in notes:
        print(f"mindspeed plan: {note.message}", file=sys.stderr)
    made = draft(config, options.level, options.device, options.megatron)
    if options.json:
        print(made.to_json())
    else:
        tables.show_plan(made)
        tables.show_advice(made, config)
    return PROBLEM if made.problems else OK


def _run_features(options: argparse.Namespace) -> int:
    from mindspeed import tables

    rows = tables.feature_rows()
    if options.json:
        print(json.dumps(rows, indent=1))
    else:
        tables.show_features(rows)
    return OK


def _run_conflicts(options: argparse.Namespace) -> int:
    from mindspeed import tables
    from mindspeed.features import load_table
    from mindspeed.patching.matrix import pair_matrix

    matrix = pair_matrix(load_table())
    if options.json:
        print(json.dumps([asdict(pair) for pair in matrix], indent=1))
    else:
        tables.show_conflicts(load_table(), matrix)
    return OK


def _run_flags(options: argparse.Namespace) -> int:
    from mindspeed import tables
    from mindspeed.features.flags import flag_rows

    rows = [r for r in flag_rows() if options.status in (None, r.flag.status)]
    if options.markdown:
        print(tables.flags_markdown(), end="")
    elif options.json:
        print(json.dumps([asdict(row) for row in rows], indent=1))
    else:
        tables.show_flags(rows)
    return OK


def _profile_options(command: argparse.ArgumentParser) -> None:
    from mindspeed import profile_cli

    profile_cli.add_options(command)


def _run_profile(options: argparse.Namespace) -> int:
    from mindspeed import profile_cli

    return profile_cli.run(options)


def _run_doctor(options: argparse.Namespace) -> int:
    from mindspeed import tables
    from mindspeed.doctor import examine

    findings = examine()
    if options.json:
        print(json.dumps([asdict(finding) for finding in findings], indent=1))
    else:
        tables.show_findings(findings)
    return PROBLEM if any(finding.verdict == "bad" for finding in findings) else OK


def _run_fingerprint(options: argparse.Namespace) -> int:
    from mindspeed.features import load_features
    from mindspeed.patching.fingerprints import RECORDS, make_record, write_record
    from mindspeed.patching.source import open_source

    sources = [open_source(path) for path in options.sources]
    versions = {source.version for source in sources}
    version = versions.pop()
    if versions or version is None:
        raise ValueError(f"the sources must be of one version, found {versions | {version}}")
    patches = [patch for feature in load_features() for patch in feature.patches]
    record = make_record(sources, version, patches)
    if options.json:
        print(json.dumps(record, indent=1))
    else:
        path = write_record(record, options.out or RECORDS)
        print(f"{len(record['targets'])} signatures of megatron-core {version}: {path}")
    return OK


_COMMANDS: tuple[tuple[str, Callable[[argparse.Namespace], int], str], ...] = (
    ("doctor", _run_doctor, "what is installed, what fits, what to do"),
    ("plan", _run_plan, "what a Megatron command line would change, and why"),
    ("features", _run_features, "every feature with level, flags, packages and status"),
    ("conflicts", _run_conflicts, "which features cannot be combined"),
    ("flags", _run_flags, "the flags of MindSpeed and what became of each"),
    ("profile", _run_profile, "sum up a profile, or compare two"),
    ("fingerprint", _run_fingerprint, "record the signatures of patched names from a source"),
)
_OPTIONS: dict[str, Callable[[argparse.ArgumentParser], None]] = {
    "plan": _plan_options,
    "flags": _flags_options,
    "profile": _profile_options,
    "fingerprint": _fingerprint_options,
}

if __name__ == "__main__":
    sys.exit(main())
