"""Reading a Megatron command line without Megatron."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from mindspeed.features import add_flags
from mindspeed.features.native import add_native


def parse_megatron(argv: Sequence[str], prog: str = "megatron") -> argparse.Namespace:
    """Megatron's arguments with their defaults, ours included.

    Nothing of Megatron's own validation runs. An unknown flag, a bad value, and a planned or
    dropped flag end the process with status 2 and one readable line.
    """
    parser = argparse.ArgumentParser(prog=prog, allow_abbrev=False, add_help=False)
    add_native(parser)
    add_flags(parser)
    plain = parser.error

    def error(message: str) -> None:
        # The usage lines of 700 flags would hide the message.
        parser.usage = argparse.SUPPRESS
        plain(message)

    parser.error = error  # type: ignore[method-assign,assignment]
    return parser.parse_args(list(argv))
