"""What MuSe attention costs, from its options alone: query-key pairs per head, then FLOPs and bytes, part by part."""

from collections.abc import Sequence
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
    """Queries times the summaries they see."""
    stage_1: float
    """Query clusters times far keys, three products each (with k for the mass, then for kbar and vbar): 1.5 pairs."""
    retrieved: float
    """Queries times the keys of the retrieved clusters."""
    selection: float
    """Products with keys alone, half a pair each: query clusters times far keys, and by "peak_mass" queries times the
    candidates' keys."""

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


def muse_pairs(num_tokens: int, options: MuseOptions, *, has_documents: bool = False) -> MusePairs:
    """Pairs that `muse_attention` works on for one document of `num_tokens` tokens, packed with others or a row."""
    resolved = options.resolved(head_dim=1, has_documents=has_documents)
    if num_tokens <= resolved.exact_below:
        exact = num_tokens * (num_tokens + 1) / 2 if options.causal else float(num_tokens**2)
        return MusePairs(near=exact, summaries=0, stage_1=0, retrieved=0, selection=0)
    near = summaries = stage_1 = retrieved = means = candidates = 0.0
    for start in range(0, num_tokens, options.chunk):
        queries = min(options.chunk, num_tokens - start)
        far_keys = start if options.causal else num_tokens - queries
        query_clusters = -(-queries // options.query_cluster)
        near += queries * (queries + 1) / 2 if options.causal else queries**2
        summaries += queries * -(-far_keys // resolved.summary_cluster)
        stage_1 += 1.5 * query_clusters * far_keys
        retrieved += queries * min(options.top_k * options.key_cluster, far_keys)
        means += query_clusters * far_keys
        candidates += queries * min(options.candidates * options.key_cluster, far_keys)
    selection = means / 2 if options.top_k > 0 else 0.0
    if options.selection == "peak_mass" and 0 < options.top_k < options.candidates:
        selection += candidates / 2
    return MusePairs(near, summaries, stage_1, retrieved, selection)


@dataclass(frozen=True)
class Work:
    """What a part has to do: floating-point operations of its matrix products, and bytes it reads and writes."""

    flops: float
    bytes: float

    def __add__(self, other: "Work") -> "Work":
        return Work(self.flops + other.flops, self.bytes + other.bytes)


NO_WORK = Work(0, 0)


def muse_work(
    lengths: Sequence[int],
    options: MuseOptions,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    element_size: int,
    has_documents: bool = False,
) -> dict[str, Work]:
    """Work of one forward and backward pass over documents of these lengths, by part of the decomposition.

    Matrix products alone are counted, those that the backward pass repeats included: 5 products for a near pair, 5 for
    a summary, 3 for dq and 4 for dk, dv of a retrieved key, 6 from summaries to their keys, each 2 * head_dim FLOPs.
    The backward pass gathers keys and makes summaries again. Bytes: every input read once and every output written
    once, whether they lie in device memory or, as summaries of a small workspace do, in its cache.

    Args:
        lengths: tokens of the documents that are attended separately.
        num_heads, num_kv_heads, head_dim: of q, and of k and v.
        element_size: bytes of one element of q.
        has_documents: the documents are packed, `cu_seqlens` is given.
    Returns:
        Part -> work, in the order in which the parts run; names of parts of the backward pass end with "backward".
    Source: docs/attention.md, "Kernel decomposition" and "Gradient".
    """
    product = 2 * head_dim * num_heads
    tokens = sum(lengths)
    all_pairs = [muse_pairs(length, options, has_documents=has_documents) for length in lengths]
    exact_below = options.resolved(head_dim, has_documents=has_documents).exact_below
    long_tokens = sum(length for length in lengths if length > exact_below)
    near, summaries, far_keys, retrieved, selection = (
        sum(getattr(pairs, name) for pairs in all_pairs) / per_pair
        for name, per_pair in (("near", 1), ("summaries", 1), ("stage_1", 1.5), ("retrieved", 1), ("selection", 1))
    )
    # One tensor like q, like k, like a row of statistics; all kbar (or all vbar), all log-masses.
    q, k = (long_tokens * heads * head_dim * element_size for heads in (num_heads, num_kv_heads))
    statistics = 4 * long_tokens * num_heads
    num_summaries = summaries / options.query_cluster * num_heads
    vectors, masses = num_summaries * head_dim * element_size, 4 * num_summaries
    indices = 4 * long_tokens * (num_heads + num_kv_heads)
    all_q, all_k = (tokens * heads * head_dim * element_size for heads in (num_heads, num_kv_heads))
    all_statistics = 4 * tokens * num_heads
    # Scores are written and read; then candidates' keys, the queries and the near field's lse are.
    score_bytes = 2 * 4 * far_keys / options.key_cluster * num_heads + k
    has_candidates = options.selection == "peak_mass" and options.top_k < options.candidates
    peak_bytes = q + k + statistics if has_candidates else 0
    work = {
        "clustering": Work(0, q + k + indices),
        "gather": Work(0, 4 * k),
        "near": Work(2 * product * near, 2 * all_q + 2 * all_k + all_statistics),
        "scores": Work(2 * product * selection, score_bytes + peak_bytes if selection else 0),
        "stage 1": Work(3 * product * far_keys, 2 * k + 2 * vectors + 3 * masses),
        # The near field's out and lse are read and the merged ones written.
        "far": Work(2 * product * (summaries + retrieved), 3 * q + 2 * k + 2 * statistics + 2 * vectors + masses),
        "near backward": Work(5 * product * near, 4 * all_q + 4 * all_k + 2 * all_statistics),
        "gather backward": Work(0, 4 * k),
        "stage 1 backward": Work(3 * product * far_keys, 2 * k + 2 * vectors + 3 * masses),
        # Reads q, dout, out, dq and writes dq; q, dout, lse and delta in the order of the clusters are for the keys.
        "far backward": Work(
            product * (5 * summaries + 3 * retrieved), 7 * q + 2 * k + 3 * statistics + 4 * vectors + 2 * masses
        ),
        # dk and dv of the near field are read, and the sums written.
        "keys backward": Work(
            product * (4 * retrieved + 6 * far_keys), 2 * q + 6 * k + 2 * statistics + 2 * vectors + 3 * masses
        ),
    }
    return {part: each for part, each in work.items() if each.flops or each.bytes}


def dense_work(
    lengths: Sequence[int],
    *,
    causal: bool,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    element_size: int,
) -> dict[str, Work]:
    """Work of exact attention, as `muse_work` counts it: "near" and "near backward" alone."""
    options = MuseOptions(exact_below=max(lengths), causal=causal)
    return muse_work(
        lengths,
        options,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        element_size=element_size,
    )
