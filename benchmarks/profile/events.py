"""What EventTrace costs: a training step of two ranks with it against the same step without it.

Same steps, gates and clocks as `profile/comm`. `communication` records launches and waits alone,
`all` operators and modules too, `with CommMeter` is that and the other meter, which share one
interception of each operator.
"""

import contextlib

from comm import main

from ms_profile import CommMeter
from ms_profile.events import EventTrace


@contextlib.contextmanager
def both():
    with EventTrace(), CommMeter():
        yield


def contenders():
    return {
        "off": contextlib.nullcontext,
        "communication": lambda: EventTrace(ops=False, forwards=False),
        "all": EventTrace,
        "with CommMeter": both,
    }


if __name__ == "__main__":
    main("events", contenders, __doc__.splitlines()[0])
