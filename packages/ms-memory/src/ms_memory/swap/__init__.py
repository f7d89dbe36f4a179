"""Saved tensors on the host between forward and backward."""

from ..stages import Site
from .modules import Swapped, inside, install, modules
from .pool import Block, HostPool
from .prefetch import Prefetcher

__all__ = [
    "Block",
    "HostPool",
    "Prefetcher",
    "Site",
    "Swapped",
    "inside",
    "install",
    "modules",
]
