"""The paper's baseline: contiguous blocks of keys summarised by their plain means."""

from muse_lightning.attention.muse import Muse


class SpatialBlocks(Muse):
    """MuSe's operator with contiguous clusters and plain means: what block-sparse attention without semantics gives.

    With the same chunk, key_cluster and top_k as Muse it retrieves as many keys, chosen in the same way. A block of
    neighbouring queries chooses for all of them, for the first by what the last look for: a training has learnt to look
    ahead by it, so that its own loss may flatter it (docs/attention.md, "Causality, stated exactly").

    Args:
        layer_idx: number of the layer, from 0.
        chunk: tokens per chunk; the own chunk is exact.
        query_cluster: tokens per block of queries.
        key_cluster: tokens per block of keys.
        top_k: key blocks that each query block attends exactly.
        exact_below: documents of at most so many tokens are attended exactly; null is 2 * chunk with document_mask and
            7 * chunk without.
        workspace_mib: bound on intermediate results, MiB.
    Raises:
        UserError: a value that `muse_attention` does not accept.
    """

    def __init__(
        self,
        layer_idx: int,
        chunk: int = 2048,
        query_cluster: int = 128,
        key_cluster: int = 64,
        top_k: int = 12,
        exact_below: int | None = None,
        workspace_mib: int = 1024,
    ) -> None:
        super().__init__(
            layer_idx,
            chunk=chunk,
            query_cluster=query_cluster,
            key_cluster=key_cluster,
            summary_cluster=key_cluster,
            top_k=top_k,
            expansion="zero",
            query_clustering="spatial",
            key_clustering="spatial",
            exact_below=exact_below,
            workspace_mib=workspace_mib,
        )
