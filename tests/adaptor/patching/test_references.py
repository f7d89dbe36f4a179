"""The walk that looks for copies gets through whatever a module may hold."""

import sys
from dataclasses import dataclass
from types import ModuleType

from mindspeed.patching.references import Variables, Wanted, unreachable


@dataclass(slots=True)
class Slotted:
    """A data class instance without `__dict__`, as Megatron-LM's tokenizers hold."""

    held: object
    unset: int


def original():
    return 1


def test_instance_with_slots_is_walked():
    module = ModuleType("megatron.example")
    module.settings = Slotted(original, 0)
    del module.settings.unset
    wanted = Wanted("megatron.example:original", original, (module, "original"))
    found = unreachable([("megatron.example", module)], [wanted])
    assert found == {"megatron.example:original": ["megatron.example:settings.held"]}


def test_variables_that_hold_something_are_known_after_changes(monkeypatch):
    one, two = ModuleType("example_package"), ModuleType("example_package.part")
    for module in (one, two, ModuleType("example_package_of_others")):
        monkeypatch.setitem(sys.modules, module.__name__, module)
        module.name = original
    two.other = replacement = object()
    variables = Variables()
    assert variables.holding("example_package", original) == [(one, "name"), (two, "name")]
    variables.assign("example_package", (one, "name"), replacement)
    assert one.name is replacement
    assert variables.holding("example_package", original) == [(two, "name")]
    assert variables.holding("example_package", replacement) == [(two, "other"), (one, "name")]
    variables.assign("example_package", (one, "name"), original)
    assert variables.holding("example_package", original) == [(one, "name"), (two, "name")]
