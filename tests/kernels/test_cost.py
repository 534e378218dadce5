"""Pair counts against brute-force counting over the clusters that the operator really makes."""

import pytest
import torch

from muse_kernels import muse_clusters
from muse_kernels.attention.options import MuseOptions
from muse_kernels.cost import muse_pairs

SIZES = {"chunk": 16, "query_cluster": 4, "key_cluster": 2}


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("num_tokens", [1, 16, 17, 64, 75])
@pytest.mark.parametrize("top_k", [0, 3, 1000])
def test_pairs_are_those_of_the_clusters(num_tokens: int, top_k: int, causal: bool) -> None:
    options = MuseOptions(**SIZES, top_k=top_k, causal=causal, exact_below=0)
    pairs = muse_pairs(num_tokens, options)
    x = torch.randn(1, 1, num_tokens, 4)
    clusters = muse_clusters(x, x, **SIZES, top_k=top_k, causal=causal, exact_below=0)
    query_order, key_order, selected = (y[0, 0] for y in (clusters.query_order, clusters.key_order, clusters.selected))
    keys_of = (key_order >= 0).view(-1, SIZES["key_cluster"]).sum(-1)
    chunk_of = torch.arange(len(keys_of)) // (SIZES["chunk"] // SIZES["key_cluster"])

    near = summaries = stage_1 = retrieved = 0
    for row in range(query_order.shape[0]):
        in_sight = (keys_of > 0) & ((chunk_of < row) if causal else (chunk_of != row))
        tokens = query_order[row][query_order[row] >= 0]
        near += sum(int(((tokens <= token) if causal else (tokens >= 0)).sum()) for token in tokens)
        for cluster, members in enumerate(query_order[row].view(-1, SIZES["query_cluster"])):
            queries = int((members >= 0).sum())
            chosen = selected[row, cluster][selected[row, cluster] >= 0].long()
            summaries += queries * int(in_sight.sum())
            retrieved += queries * int(keys_of[chosen].sum())
            stage_1 += (queries > 0) * int(keys_of[in_sight].sum())
    assert (pairs.near, pairs.summaries, pairs.stage_1) == (near, summaries, 1.5 * stage_1)
    # The formula prices the best case of a partial last cluster at its full size.
    assert retrieved <= pairs.retrieved <= retrieved + num_tokens * SIZES["key_cluster"]
    if causal:
        assert pairs.retrieved == retrieved
    assert pairs.selection == (summaries if top_k else 0)


def test_the_design_point_costs_a_tenth_of_dense() -> None:
    """docs/attention.md, "Kernel decomposition"; its figures count far keys in the first chunk too, which has none."""
    pairs, dense = muse_pairs(65536, MuseOptions()), 65536**2 / 2
    parts = [pairs.near, pairs.summaries, pairs.stage_1, pairs.retrieved, pairs.selection]
    assert [round(100 * part / dense, 1) for part in parts] == pytest.approx([3.1, 1.6, 1.2, 3.1, 1.6], abs=0.11)
    assert pairs.training == pytest.approx(pairs.forward - 2 / 3 * pairs.selection)


@pytest.mark.parametrize("num_tokens", [1, 10, 64])
def test_an_exact_document_costs_what_dense_attention_costs(num_tokens: int) -> None:
    pairs = muse_pairs(num_tokens, MuseOptions(**SIZES))
    assert pairs.forward == pairs.training == num_tokens * (num_tokens + 1) / 2
