"""Tokens to the order of their experts and back, from expert indices or from a routing map."""

from .index_form import moe_permute, moe_unpermute
from .map_form import moe_permute_map, moe_unpermute_map

__all__ = ["moe_permute", "moe_permute_map", "moe_unpermute", "moe_unpermute_map"]
