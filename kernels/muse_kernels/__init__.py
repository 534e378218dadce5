"""Attention operators in PyTorch and Triton, useful without Lightning: `muse_attention` and what belongs to it."""

from muse_kernels.attention import MuseClusters, MuseMass, muse_attention, muse_clusters, muse_mass

__all__ = ["MuseClusters", "MuseMass", "muse_attention", "muse_clusters", "muse_mass"]
