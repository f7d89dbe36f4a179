"""The arguments of the Megatron-LM script that runs in this process."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping
from typing import Any


def script_arguments() -> Mapping[str, Any]:
    """Return the validated arguments by name; empty where no script of Megatron-LM runs."""
    module = sys.modules.get("megatron.training.global_vars")
    args = getattr(module, "_GLOBAL_ARGS", None)
    return {} if args is None else vars(args)


def before_post_init(
    setup: Callable[[Any, Mapping[str, Any]], None],
) -> Callable[[Callable[[Any], None]], Callable[[Any], None]]:
    """Return a wrapper of `TransformerConfig.__post_init__` that calls `setup` first.

    The class is the same object for everyone, also for builders of a script that took their names
    from Megatron before the arguments were parsed.

    Args:
        setup: called with the configuration and the script's arguments, if there are any.
    """

    def wrap(original: Callable[[Any], None]) -> Callable[[Any], None]:
        @functools.wraps(original)
        def post_init(self: Any) -> None:
            values = script_arguments()
            if values:
                setup(self, values)
            original(self)

        return post_init

    return wrap
