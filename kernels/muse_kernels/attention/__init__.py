"""The MuSe attention operator; its definition is docs/attention.md."""

from muse_kernels.attention.op import muse_attention, muse_clusters
from muse_kernels.attention.reference import MuseClusters

__all__ = ["MuseClusters", "muse_attention", "muse_clusters"]
