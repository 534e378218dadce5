"""The MuSe attention operator; its definition is docs/attention.md."""

from muse_kernels.attention.mass import MuseMass, muse_mass
from muse_kernels.attention.op import muse_attention, muse_clusters
from muse_kernels.attention.reference import MuseClusters

__all__ = ["MuseClusters", "MuseMass", "muse_attention", "muse_clusters", "muse_mass"]
