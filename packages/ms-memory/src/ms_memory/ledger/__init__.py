"""Exact bytes, as integers: what is saved, what is alive, what lies on the host, and when."""

from .census import StorageCensus
from .host import HostLedger
from .saved import Saved, SavedLedger
from .timeline import Event, Timeline

__all__ = ["Event", "HostLedger", "Saved", "SavedLedger", "StorageCensus", "Timeline"]
