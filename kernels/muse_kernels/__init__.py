"""Attention operators in PyTorch and Triton, useful without Lightning: `muse_attention` and what belongs to it."""

from muse_kernels.attention import MuseClusters, muse_attention, muse_clusters

__all__ = ["MuseClusters", "muse_attention", "muse_clusters"]
