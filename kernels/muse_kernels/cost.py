"""What MuSe attention costs, from its options alone: query-key pairs per head, part by part."""

from dataclasses import dataclass

from muse_kernels.attention.options import MuseOptions


@dataclass(frozen=True)
class MusePairs:
    """Query-key pairs per head of one forward pass over one document.

    A pair is a product with a key and one with a value: 4 * head_dim FLOPs. Clustering, gather and merge move data and
    are not counted.
    """

    near: float
    """Pairs inside chunks; all pairs of a document that is exact."""
    summaries: float
    """Queries times the summaries they see, retrieved clusters' included."""
    stage_1: float
    """Query clusters times far keys, three products each (with k for the mass, then for kbar and vbar): 1.5 pairs."""
    retrieved: float
    """Queries times the keys of the retrieved clusters."""
    selection: float
    """The two passes over summaries (products with kbar alone) of selection by query mass."""

    @property
    def forward(self) -> float:
        """Pairs of the forward pass."""
        return self.near + self.summaries + self.stage_1 + self.retrieved + self.selection

    @property
    def training(self) -> float:
        """Forward and backward pass, in units in which the backward pass is twice the forward pass.

        Selection has no backward pass.
        """
        return self.forward - self.selection * 2 / 3


def muse_pairs(num_tokens: int, options: MuseOptions) -> MusePairs:
    """Pairs that `muse_attention` works on for one document of `num_tokens` tokens."""
    resolved = options.resolved(head_dim=1)
    if num_tokens <= resolved.exact_below:
        exact = num_tokens * (num_tokens + 1) / 2 if options.causal else float(num_tokens**2)
        return MusePairs(near=exact, summaries=0, stage_1=0, retrieved=0, selection=0)
    near = summaries = stage_1 = retrieved = 0.0
    for start in range(0, num_tokens, options.chunk):
        queries = min(options.chunk, num_tokens - start)
        far_keys = start if options.causal else num_tokens - queries
        far_clusters = -(-far_keys // options.key_cluster)
        near += queries * (queries + 1) / 2 if options.causal else queries**2
        summaries += queries * far_clusters
        stage_1 += 1.5 * -(-queries // options.query_cluster) * far_keys
        retrieved += queries * min(options.top_k * options.key_cluster, far_keys)
    selection = summaries if options.selection == "query_mass" and options.top_k > 0 else 0.0
    return MusePairs(near, summaries, stage_1, retrieved, selection)
