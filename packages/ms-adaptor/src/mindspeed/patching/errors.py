"""What the engine raises when it refuses."""

from __future__ import annotations

from collections.abc import Iterable


class PatchError(RuntimeError):
    """A patch could not be applied or taken back; the message names the target."""


class StalePlanError(PatchError):
    """Another plan is active, or the plan was made for another Megatron."""


class PlanError(ValueError):
    """The configuration cannot be served; every problem found is listed.

    Attributes:
        problems: one readable sentence each.
    """

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = tuple(problems)
        count = len(self.problems)
        head = "1 problem" if count == 1 else f"{count} problems"
        super().__init__("\n".join([f"{head} with this configuration:", *self._numbered()]))

    def _numbered(self) -> list[str]:
        return [f"  {number}. {text}" for number, text in enumerate(self.problems, 1)]
