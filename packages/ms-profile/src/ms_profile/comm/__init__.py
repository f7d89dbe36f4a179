"""Communication of one rank: bytes, calls and order, counted from what torch dispatches.

    with CommMeter() as meter:
        train_step()
    meter.table()       # calls and bytes per group, operation and phase
    meter.gather()      # bytes from rank to rank

Limit: communication that does not pass torch's dispatcher is not seen: stores, rendezvous and the
making of groups, and kernels that communicate on their own.
"""

from ms_profile.comm.meter import Call, CommMeter
from ms_profile.comm.transfers import Transfer, register

__all__ = ["Call", "CommMeter", "Transfer", "register"]
