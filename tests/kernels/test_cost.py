"""Pair counts against brute-force counting over the clusters that the operator really makes."""

from dataclasses import replace

import pytest
import torch

from muse_kernels import MuseClusters, muse_clusters
from muse_kernels.attention.options import MuseOptions
from muse_kernels.cost import NO_WORK, dense_work, muse_pairs, muse_work

SIZES = {"chunk": 16, "query_cluster": 4, "key_cluster": 2, "summary_cluster": 4}


def counted(clusters: MuseClusters, starts: list[int], candidates: int, causal: bool) -> dict[str, float]:
    """Pairs of one head, one by one, over the clusters that the operator has made of packed documents.

    Args:
        starts: first token of each document.
    """
    query_order, key_order, selected = (y[0, 0] for y in (clusters.query_order, clusters.key_order, clusters.selected))
    keys_of = (key_order >= 0).view(-1, SIZES["key_cluster"]).sum(-1)
    summaries_of = (keys_of.view(-1, 2).sum(-1) > 0).repeat_interleave(2) / 2  # two key clusters share a summary
    chunk_of = torch.arange(len(keys_of)) // (SIZES["chunk"] // SIZES["key_cluster"])
    document_of = torch.searchsorted(torch.tensor(starts), key_order.amax(-1), right=True)[chunk_of]

    found = dict.fromkeys(("near", "summaries", "stage_1", "retrieved", "looked_at"), 0.0)
    for row in range(query_order.shape[0]):
        other = (chunk_of < row) if causal else (chunk_of != row)
        others = other & (document_of == document_of[chunk_of == row][0])
        in_sight = (keys_of > 0) & others
        tokens = query_order[row][query_order[row] >= 0]
        found["near"] += sum(int(((tokens <= token) if causal else (tokens >= 0)).sum()) for token in tokens)
        for cluster, members in enumerate(query_order[row].view(-1, SIZES["query_cluster"])):
            queries = int((members >= 0).sum())
            chosen = selected[row, cluster][selected[row, cluster] >= 0].long()
            found["summaries"] += queries * float(summaries_of[others].sum())
            found["retrieved"] += queries * int(keys_of[chosen].sum())
            found["stage_1"] += (queries > 0) * int(keys_of[in_sight].sum())
            found["looked_at"] += queries * min(candidates * SIZES["key_cluster"], int(keys_of[in_sight].sum()))
    return found


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("num_tokens", [1, 16, 17, 64, 75])
@pytest.mark.parametrize(("top_k", "candidates"), [(0, 5), (3, 5), (3, 3), (1000, 5), (3, 1000)])
def test_pairs_are_those_of_the_clusters(num_tokens: int, top_k: int, candidates: int, causal: bool) -> None:
    options = MuseOptions(**SIZES, top_k=top_k, candidates=candidates, causal=causal, exact_below=0)
    pairs = muse_pairs(num_tokens, options)
    x = torch.randn(1, 1, num_tokens, 4)
    clusters = muse_clusters(x, x, **SIZES, top_k=top_k, causal=causal, exact_below=0)
    found = counted(clusters, [0], candidates, causal)
    assert (pairs.near, pairs.summaries, pairs.stage_1) == (found["near"], found["summaries"], 1.5 * found["stage_1"])
    # The formula prices the best case of a partial last cluster at its full size.
    assert found["retrieved"] <= pairs.retrieved <= found["retrieved"] + num_tokens * SIZES["key_cluster"]
    if causal:
        assert pairs.retrieved == found["retrieved"]
    means = found["stage_1"] / 2 if top_k else 0
    assert pairs.selection == means + (found["looked_at"] / 2 if 0 < top_k < candidates else 0)
    assert muse_pairs(num_tokens, replace(options, selection="centroid")) == replace(pairs, selection=means)


@pytest.mark.parametrize("lengths", [[75, 20, 40], [33, 5, 1, 64], [10, 10]], ids=str)
def test_pairs_of_packed_documents_are_those_of_their_clusters(lengths: list[int]) -> None:
    """Documents of up to 10 tokens are exact: all their pairs are near."""
    options = MuseOptions(**SIZES, top_k=3, candidates=5, exact_below=10)
    pairs = [muse_pairs(length, options, has_documents=True) for length in lengths]
    ends = torch.tensor(lengths).cumsum(0)
    cu_seqlens = torch.cat((torch.tensor([0]), ends, ends[-1:])).int()
    x = torch.randn(1, 1, int(ends[-1]), 4)
    clusters = muse_clusters(x, x, cu_seqlens=cu_seqlens, **SIZES, top_k=3, exact_below=10)
    found = counted(clusters, cu_seqlens[:-2].tolist(), 5, causal=True)
    exact = sum(query >= key for length in lengths if length <= 10 for query in range(length) for key in range(length))
    assert sum(each.near for each in pairs) == found["near"] + exact
    assert sum(each.summaries for each in pairs) == found["summaries"]
    assert sum(each.stage_1 for each in pairs) == 1.5 * found["stage_1"]
    assert sum(each.retrieved for each in pairs) == found["retrieved"]
    assert sum(each.selection for each in pairs) == (found["stage_1"] + found["looked_at"]) / 2


def test_the_defaults_cost_a_tenth_of_dense() -> None:
    """docs/attention.md, "Kernel decomposition"; its figures count far keys in the first chunk too, which has none."""
    pairs, dense = muse_pairs(65536, MuseOptions()), 65536**2 / 2
    parts = [pairs.near, pairs.summaries, pairs.stage_1, pairs.retrieved, pairs.selection]
    assert [round(100 * part / dense, 1) for part in parts] == pytest.approx([3.1, 0.2, 1.2, 2.3, 4.9], abs=0.11)
    assert pairs.training == pytest.approx(pairs.forward - 2 / 3 * pairs.selection)


@pytest.mark.parametrize("num_tokens", [1, 10, 64])
def test_an_exact_document_costs_what_dense_attention_costs(num_tokens: int) -> None:
    pairs = muse_pairs(num_tokens, MuseOptions(**SIZES))
    assert pairs.forward == pairs.training == num_tokens * (num_tokens + 1) / 2


@pytest.mark.parametrize(("has_documents", "chunks"), [(False, 7), (True, 2)])
def test_packed_documents_are_exact_up_to_fewer_tokens(has_documents: bool, chunks: int) -> None:
    longest = chunks * SIZES["chunk"]
    for num_tokens, is_exact in ((longest, True), (longest + 1, False)):
        pairs = muse_pairs(num_tokens, MuseOptions(**SIZES), has_documents=has_documents)
        assert (pairs.near == num_tokens * (num_tokens + 1) / 2) == is_exact
        work = muse_work([num_tokens], MuseOptions(**SIZES), has_documents=has_documents, **HEADS)
        assert ("far" not in work) == is_exact


HEADS = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "element_size": 2}


class TestWork:
    def test_flops_are_products_times_pairs(self) -> None:
        options = MuseOptions(**SIZES, top_k=3, exact_below=0)
        pairs, work = muse_pairs(75, options), muse_work([75], options, **HEADS)
        product = 2 * 8 * 4
        assert work["near"].flops == 2 * product * pairs.near
        assert work["near backward"].flops == 2.5 * work["near"].flops
        assert work["stage 1"].flops == 2 * product * pairs.stage_1
        assert work["scores"].flops == 2 * product * pairs.selection
        assert work["far"].flops == 2 * product * (pairs.summaries + pairs.retrieved)
        assert work["far backward"].flops == product * (5 * pairs.summaries + 3 * pairs.retrieved)
        assert work["keys backward"].flops == 4 * product * (pairs.retrieved + pairs.stage_1)
        assert work["stage 1 backward"].flops == work["stage 1"].flops
        forward = sum(work[part].flops for part in work if not part.endswith("backward"))
        assert forward == 2 * product * pairs.forward

    def test_bytes_by_hand(self) -> None:
        # Two chunks of 16: each of the second's 4 query clusters sees 8 key clusters, 4 summaries.
        options = MuseOptions(**SIZES, top_k=3, candidates=5, exact_below=0)
        work = muse_work([32], options, **HEADS)
        q, k, vectors, masses = 32 * 4 * 8 * 2, 32 * 2 * 8 * 2, 4 * 16 * 8 * 2, 4 * 16 * 4
        assert work["stage 1"].bytes == work["stage 1 backward"].bytes == 2 * k + 2 * vectors + 3 * masses
        scores = 2 * 4 * 32 * 4
        assert work["scores"].bytes == scores + k + q + k + 4 * 32 * 4
        by_centroid = muse_work([32], replace(options, selection="centroid"), **HEADS)
        assert by_centroid["scores"].bytes == scores + k
        assert work["clustering"].bytes == q + k + 4 * 32 * 6
        assert work["near"].bytes == 2 * q + 2 * k + 4 * 32 * 4

    def test_documents_add_up_and_an_exact_one_has_a_near_field_alone(self) -> None:
        options = MuseOptions(**SIZES, exact_below=20)
        parts = [muse_work([length], options, **HEADS) for length in (75, 20)]
        both = muse_work([75, 20], options, **HEADS)
        assert list(parts[1]) == ["near", "near backward"]
        assert both == {part: parts[0][part] + parts[1].get(part, NO_WORK) for part in parts[0]}
        assert muse_work([20], options, **HEADS) == dense_work([20], causal=True, **HEADS)

    def test_where_nothing_is_retrieved_there_are_no_scores(self) -> None:
        assert "scores" in muse_work([75], MuseOptions(**SIZES, exact_below=0), **HEADS)
        assert "scores" not in muse_work([75], MuseOptions(**SIZES, exact_below=0, top_k=0), **HEADS)
