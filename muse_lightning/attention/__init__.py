"""Attention strategies: what a layer does with q, k and v. One strategy per file; none has parameters."""

from muse_lightning.attention.base import AttentionStrategy
from muse_lightning.attention.dense import Dense
from muse_lightning.attention.description import describe_layers, kind_of
from muse_lightning.attention.exact import exact_attention, exact_in, is_exact, layer_numbers
from muse_lightning.attention.muse import Muse
from muse_lightning.attention.sliding_window import SlidingWindow
from muse_lightning.attention.spatial_blocks import SpatialBlocks

__all__ = [
    "AttentionStrategy",
    "Dense",
    "Muse",
    "SlidingWindow",
    "SpatialBlocks",
    "describe_layers",
    "exact_attention",
    "exact_in",
    "is_exact",
    "kind_of",
    "layer_numbers",
]
