"""Shares of softmax mass, against sums of exponentials of all logits and against the operator's own lse."""

import pytest
import torch

from muse_kernels import muse_attention, muse_clusters, muse_mass

OPTIONS = {"chunk": 16, "query_cluster": 8, "key_cluster": 4, "top_k": 2, "candidates": 4, "exact_below": 0}
N = 72


def qk(num_kv_heads: int = 2, head_dim: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    q = torch.randn(1, 4, N, head_dim, dtype=torch.float64, generator=generator)
    k = torch.randn(1, num_kv_heads, N, head_dim, dtype=torch.float64, generator=generator)
    return 2 * q, 2 * k


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths", [None, (5, 40, 27)], ids=["one document", "documents"])
def test_near_and_retrieved_are_sums_over_their_keys(causal: bool, lengths: tuple[int, ...] | None) -> None:
    q, k = qk()
    documents = torch.tensor([0, 5, 45, 72], dtype=torch.int32) if lengths else None
    options = {**OPTIONS, "causal": causal}
    mass = muse_mass(q, k, cu_seqlens=documents, **options)
    _, lse = muse_attention(q, k, k, cu_seqlens=documents, return_lse=True, **options)
    clusters = muse_clusters(q, k, cu_seqlens=documents, **options)
    near, retrieved = torch.zeros_like(mass.near), torch.zeros_like(mass.near)
    row = 0
    for start, length in zip((0, 5, 45) if lengths else (0,), lengths or (N,), strict=True):
        rows = -(-length // 16)
        members = clusters.key_order[0, :, row : row + rows].flatten(1).unflatten(1, (-1, 4))  # [T, clusters, 4]
        for head in range(4):
            logits = q[0, head] @ k[0, head // 2].T / 8**0.5
            for chunk in range(rows):
                for cluster in range(2):
                    queries = clusters.query_order[0, head, row + chunk, 8 * cluster : 8 * cluster + 8]
                    chosen = clusters.selected[0, head, row + chunk, cluster]
                    chosen = chosen[chosen >= 0] - 4 * row
                    keys = members[head // 2, chosen].flatten()
                    for query in queries[queries >= 0].tolist():
                        first = start + 16 * chunk
                        last = query + 1 if causal else min(first + 16, start + length)
                        weight = (logits[query] - lse[0, head, query]).exp()
                        near[0, head, query] = weight[first:last].sum()
                        retrieved[0, head, query] = weight[keys[keys >= 0]].sum()
        row += rows
    assert retrieved.max() > 0.05
    torch.testing.assert_close(mass.near, near)
    torch.testing.assert_close(mass.retrieved, retrieved)
    torch.testing.assert_close(mass.near + mass.retrieved + mass.summaries, torch.ones_like(near))
    assert mass.summaries.amax() > 0.05
    assert (mass.summaries >= 0).all()


def test_an_exact_document_is_all_near() -> None:
    mass = muse_mass(*qk(), **{**OPTIONS, "exact_below": N})
    assert (mass.near == 1).all()
    assert not mass.retrieved.any()
    assert not mass.summaries.any()


def test_without_retrieval_everything_far_is_in_summaries() -> None:
    mass = muse_mass(*qk(), **{**OPTIONS, "top_k": 0})
    assert not mass.retrieved.any()
    assert mass.summaries[:, :, 16:].min() > 0
    assert not mass.summaries[:, :, :16].any()
