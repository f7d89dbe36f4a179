"""What EventTrace costs: a training step of two ranks with it against the same step without it.

Same steps, gates and clocks as `profile/comm`. `communication` records launches and waits alone,
`all` operators and modules too, `with CommMeter` is that and the other meter, which share one
interception of each operator.

`--timeline FILE.svg` draws two ranks that hide an all-to-all behind compute, and then do not, and
`--schedule FILE.svg` a pipeline schedule in logical time, instead.
"""

import contextlib
import json
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from comm import RANKS, arguments, main

from ms_profile import CommMeter
from ms_profile.clock import Compute, Receive, Send, simulate
from ms_profile.events import EventTrace, LinkDelay


@contextlib.contextmanager
def both():
    with EventTrace(), CommMeter():
        yield


def contenders():
    return {
        "off": contextlib.nullcontext,
        "off again": contextlib.nullcontext,
        "communication": communication_alone,
        "all": EventTrace,
        "with CommMeter": both,
    }


def communication_alone():
    return EventTrace(ops=False, forwards=False)


def record(rank, store, folder):
    """Tokens travel for 60 ms while an expert that is here computes for 50, then before it."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    tokens, arrived = torch.ones(256, 64), torch.empty(256, 64)
    with EventTrace(), LinkDelay():
        dist.all_to_all_single(arrived, tokens)  # what is done once is done
    dist.barrier()
    with EventTrace() as trace, LinkDelay(latency=0.06):
        for hidden in (True, False):
            work = dist.all_to_all_single(arrived, tokens, async_op=True)
            if not hidden:
                work.wait()
            with trace.mark("expert"):
                time.sleep(0.05)
            if hidden:
                work.wait()
    Path(f"{folder}/rank{rank}.json").write_text(json.dumps(trace.as_dict()))
    dist.destroy_process_group()


def draw_timeline(path):
    from ms_profile.report.pictures import timeline

    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(record, (f"{folder}/store", folder), nprocs=RANKS)
        files = sorted(Path(folder).glob("rank*.json"))
        timeline([json.loads(file.read_text()) for file in files], path)


def stage(rank, ranks, micro):
    """1F1B of one rank: as many forwards ahead as stages follow, then one each in turns."""
    warm = min(ranks - 1 - rank, micro)
    order = [("F", j) for j in range(warm)]
    for j in range(micro):
        order += [("F", j + warm)] * (j + warm < micro) + [("B", j)]
    for kind, j in order:
        source, to, cost = (rank - 1, rank + 1, 2) if kind == "F" else (rank + 1, rank - 1, 4)
        if 0 <= source < ranks:
            yield Receive(source, f"{kind}{j}")
        yield Compute(cost, f"{kind}{j}")
        if 0 <= to < ranks:
            yield Send(to, f"{kind}{j}")


def draw_schedule(path):
    from ms_profile.report.pictures import timeline

    clocks = simulate([list(stage(rank, 4, 8)) for rank in range(4)])
    timeline([clock.as_dict(rank) for rank, clock in enumerate(clocks)], path)


if __name__ == "__main__":
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--timeline", metavar="FILE.svg", help="draw a timeline instead")
    parser.add_argument("--schedule", metavar="FILE.svg", help="draw a schedule instead")
    options = parser.parse_args()
    if options.timeline:
        draw_timeline(options.timeline)
    elif options.schedule:
        draw_schedule(options.schedule)
    else:
        main("events", contenders, options)
