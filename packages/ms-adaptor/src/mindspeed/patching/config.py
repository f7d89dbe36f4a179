"""One view of a configuration, whatever it is: a namespace, a mapping, or any object."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


class Config(Mapping[str, Any]):
    """Read-only values of a configuration, with a default for each name it does not set.

    Args:
        given: `argparse.Namespace`, a mapping, an object with attributes, or `None` for defaults.
        defaults: value of every declared name.
    """

    def __init__(self, given: object, defaults: Mapping[str, Any]) -> None:
        self._defaults = defaults
        self._given = given
        if isinstance(given, (str, bytes, list, tuple)):
            raise TypeError(
                f"config must be a namespace, a mapping or an object with attributes, got"
                f" {type(given).__name__}; parse the command line first"
            )

    def __getitem__(self, name: str) -> Any:
        if isinstance(self._given, Mapping):
            return self._given[name] if name in self._given else self._defaults[name]
        if self._given is not None and hasattr(self._given, name):
            return getattr(self._given, name)
        return self._defaults[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._defaults)

    def __len__(self) -> int:
        return len(self._defaults)

    def holds(self, name: str) -> bool:
        """Whether the configuration itself has a value for `name`."""
        if isinstance(self._given, Mapping):
            return name in self._given
        return self._given is not None and hasattr(self._given, name)

    def gives(self, name: str) -> bool:
        """Whether the configuration itself has a value for `name` that is not the default."""
        return self.holds(name) and not _same(self[name], self._defaults.get(name))


def _same(value: Any, default: Any) -> bool:
    try:
        return value is default or bool(value == default)
    except (TypeError, ValueError, RuntimeError):
        return False  # Arrays have no one answer; no default is an array.
