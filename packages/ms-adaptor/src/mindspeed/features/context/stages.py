"""Where documents begin, on the way from the first pipeline stage to the later ones.

Megatron gives tokens to the first stage alone. It finds the documents of a micro batch and sends
where they begin, a few integers, from host to host over connections of its own: the messages of
the pipeline keep their order. A later stage receives when its first chunk runs that micro batch,
which by then the first stage has run; further chunks of a stage find it there.
"""

from __future__ import annotations

import functools
from collections import Counter, deque
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.constants import default_pg_timeout

from mindspeed.features.context.documents import end_of_document

_FACTS = 3  # pass, micro batch, number of integers: in front of every message
_HEAD = 64  # integers of a message; what does not fit follows in another
_HELD = 4096  # micro batches whose messages are kept alive: no stage is so far behind


class Link:
    """Host connections between the stages of a pipeline.

    Attributes:
        group: the pipeline's ranks.
        store: of the world that they belong to.
        number: how many links this world has had for groups of this name.
    """

    def __init__(self, group: Any, store: Any, number: int) -> None:
        """Connect; all ranks of the group do it together."""
        self.group, self.store, self.number = group, store, number
        # Not by `new_group`: its local form names groups by how many a process belongs to, which
        # differs between stages (embedding groups), and its global form needs all ranks.
        name = f"mindspeed/documents/{group.group_name}/{number}"
        named = dist.distributed_c10d.PrefixStore(name, store)
        self._hosts: Any = dist.ProcessGroupGloo(
            named, group.rank(), group.size(), default_pg_timeout
        )
        self._sent: deque[list[Any]] = deque(maxlen=_HELD)
        self._passes = 0

    def begin(self) -> int:
        """Return the number of a new pass, the same on all stages."""
        self._passes += 1
        return self._passes

    def send(self, starts: Tensor, number: int, index: int) -> None:
        """Send to the later stages, without waiting for them.

        Args:
            starts: int64 [n] on the host.
            number: of the pass.
            index: of the micro batch in it.
        """
        facts = torch.tensor([number, index, len(starts)])
        head = torch.zeros(_HEAD, dtype=torch.int64)
        whole = torch.cat((facts, starts))
        head[: len(whole)] = whole[:_HEAD]
        parts = [head, whole[_HEAD:].contiguous()] if len(whole) > _HEAD else [head]
        tag = _tag(number, index)
        # A message reads its tensor until it has arrived.
        self._sent.append(
            [
                (part, self._hosts.send([part], stage, tag + i))
                for stage in range(1, self.group.size())
                for i, part in enumerate(parts)
            ]
        )

    def receive(self, number: int, index: int) -> Tensor:
        """Return what the first stage has sent, or will send.

        Args:
            number: of the pass.
            index: of the micro batch in it.

        Raises:
            RuntimeError: the message is of another micro batch.
        """
        tag = _tag(number, index)
        head = self._received(_HEAD, tag)
        *found, count = head[:_FACTS].tolist()
        if found != [number, index]:
            raise RuntimeError(
                f"documents: got those of micro batch {found[1]} of pass {found[0]}, need {index}"
                f" of {number}: the pipeline stages have not run the same schedules"
            )
        rest = count - (_HEAD - _FACTS)
        starts = head[_FACTS:][:count].clone()
        return starts if rest <= 0 else torch.cat((starts, self._received(rest, tag + 1)))

    def _received(self, size: int, tag: int) -> Tensor:
        into = torch.empty(size, dtype=torch.int64)
        self._hosts.recv([into], 0, tag).wait()
        return into


def _tag(number: int, index: int) -> int:
    """Return two free numbers in 31 bits: messages of a pass that failed are never received."""
    return 2 * (number % 2**12 * 2**18 + index % 2**18)


class _Pass:
    """One run of a schedule: the micro batches of all chunks of this stage."""

    def __init__(self, link: Link) -> None:
        self.link, self.number = link, link.begin()
        self._items: list[Tensor] = []
        self._runs: Counter[int] = Counter()

    def item(self, model: Any, find: Callable[[], Tensor]) -> Tensor:
        """Return where documents begin in the micro batch that a chunk now runs.

        All chunks run the micro batches in the same order.
        """
        index = self._runs[id(model)]
        self._runs[id(model)] += 1
        if index == len(self._items):
            if self.link.group.rank() == 0:
                self._items.append(find())
                self.link.send(self._items[index], self.number, index)
            else:
                self._items.append(self.link.receive(self.number, index))
        return self._items[index]


_LINKS: dict[str, Link] = {}
_PASSES: list[_Pass] = []


def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `get_forward_backward_func`: a run of the schedule that it returns is a pass."""

    @functools.wraps(original)
    def get_forward_backward_func(*args: Any, **options: Any) -> Any:
        return passing(original(*args, **options))

    return get_forward_backward_func


def passing(schedule: Callable[..., Any]) -> Callable[..., Any]:
    """Return a schedule whose run begins and ends a pass.

    Args:
        schedule: as Megatron's, with the argument `model`.
    """

    @functools.wraps(schedule)
    def run(**call: Any) -> Any:
        group = _group(call["model"])
        if group is None:
            return schedule(**call)
        _PASSES.append(_Pass(_link(group)))
        try:
            return schedule(**call)
        finally:
            _PASSES.pop()

    return run


def shared(model: Any, find: Callable[[], Tensor]) -> Tensor:
    """Return where documents begin in the micro batch that a chunk of a model now runs.

    Args:
        model: the chunk.
        find: finds them in the tokens; called by the first stage alone.

    Raises:
        RuntimeError: later stages cannot know, because no schedule of Megatron's runs the model.
    """
    group = getattr(model, "pp_group", None)
    if group is None or group.size() == 1:
        return find()
    if not _PASSES or _PASSES[-1].link.group is not group:
        raise RuntimeError(
            "--reset-attention-mask: got a forward of a pipeline stage by itself, need one of"
            " Megatron's schedules (get_forward_backward_func), which brings documents from stage"
            " to stage"
        )
    return _PASSES[-1].item(model, find)


def _group(model: Any) -> Any:
    """Return the pipeline's ranks, None where documents are not told apart."""
    chunk = model[0] if isinstance(model, list) else model
    while hasattr(chunk, "module"):
        chunk = chunk.module
    group = getattr(chunk, "pp_group", None)
    if group is None or group.size() == 1 or end_of_document(chunk.config) is None:
        return None
    return group


def _link(group: Any) -> Link:
    found = _LINKS.get(group.group_name)
    # Groups of a world that is gone may have had the same name.
    if found is None or found.group is not group:
        store = dist.distributed_c10d._get_default_store()
        number = found.number + 1 if found is not None and found.store is store else 0
        found = _LINKS[group.group_name] = Link(group, store, number)
    return found
