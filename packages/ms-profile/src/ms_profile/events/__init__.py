"""Order of communication and compute: launches, waits, operators, modules, marks.

    with EventTrace() as trace:
        step()
    assert trace.happens_before("launch:all_to_all#0", "begin:expert")
    assert trace.happens_before("end:expert", "wait:all_to_all#0")

`LinkDelay` makes communication take a stated time, so that hiding it shows on any machine.
"""

from ms_profile.events.delay import LinkDelay
from ms_profile.events.record import Event
from ms_profile.events.trace import EventTrace

__all__ = ["Event", "EventTrace", "LinkDelay"]
