"""The patch engine: records, pure plans, and exact application and undo.

Importing this package changes nothing. `records` holds the data, `plan` decides what a run needs,
`apply` does it and takes it back.
"""

from mindspeed.patching.records import Feature, Flag, Patch, Rule

__all__ = ["Feature", "Flag", "Patch", "Rule"]
