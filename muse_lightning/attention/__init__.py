"""Attention strategies: what a layer does with q, k and v. One strategy per file; none has parameters."""

from collections.abc import Callable
from functools import partial

from muse_lightning.attention.base import AttentionStrategy
from muse_lightning.attention.dense import Dense
from muse_lightning.attention.muse import Muse
from muse_lightning.attention.sliding_window import SlidingWindow
from muse_lightning.attention.spatial_blocks import SpatialBlocks

__all__ = ["AttentionStrategy", "Dense", "Muse", "SlidingWindow", "SpatialBlocks", "exact_attention"]


def exact_attention(window: int | None) -> Callable[[int], AttentionStrategy]:
    """The attention of a model without approximation, made from the number of a layer.

    Args:
        window: tokens in sight, `LlamaConfig.sliding_window`; None: all.
    """
    return Dense if window is None else partial(SlidingWindow, window=window)
