"""The walk that looks for copies gets through whatever a module may hold."""

from dataclasses import dataclass
from types import ModuleType

from mindspeed.patching.references import Wanted, unreachable


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
