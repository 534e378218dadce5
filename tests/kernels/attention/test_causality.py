"""Each sentence of docs/attention.md, "Causality, stated exactly", on every output of a small sequence."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from muse_kernels import muse_attention, muse_clusters
from tests.kernels.attention.inputs import random_qkv

CHUNK, NUM_TOKENS = 8, 28
OPTIONS = {"chunk": CHUNK, "query_cluster": 4, "key_cluster": 2, "top_k": 2, "exact_below": 0}
Q, K, V = range(3)


def inputs() -> list[Tensor]:
    return [x.detach() for x in random_qkv(NUM_TOKENS, heads=4, kv_heads=2, dtype=torch.float32)]


def changed(qkv: list[Tensor], which: tuple[int, ...], first: int, last: int = NUM_TOKENS) -> list[Tensor]:
    """Copies in which tokens [first, last) of q, k or v are others, and large."""
    copies = [x.clone() for x in qkv]
    for index in which:
        copies[index][:, :, first:last] = 3 * torch.randn_like(copies[index][:, :, first:last])
    return copies


def outputs_that_change(qkv: list[Tensor], which: tuple[int, ...], **options: object) -> Iterator[tuple[int, bool]]:
    """For every token i: whether its output changes with the tokens after it in its own chunk."""
    before = muse_attention(*qkv, **{**OPTIONS, **options})
    for i in range(NUM_TOKENS):
        end_of_chunk = min((i // CHUNK + 1) * CHUNK, NUM_TOKENS)
        after = muse_attention(*changed(qkv, which, i + 1, end_of_chunk), **{**OPTIONS, **options})
        yield i, not torch.equal(before[:, :, : i + 1], after[:, :, : i + 1])


@pytest.mark.parametrize("selection", ["peak_mass", "centroid"])
@pytest.mark.parametrize("order", [0, 1])
def test_later_values_never_reach_an_output(selection: str, order: int) -> None:
    qkv, options = inputs(), {**OPTIONS, "selection": selection, "order": order}
    before = muse_attention(*qkv, **options)
    for i in range(NUM_TOKENS - 1):
        after = muse_attention(*changed(qkv, (V,), i + 1), **options)
        assert torch.equal(before[:, :, : i + 1], after[:, :, : i + 1]), i


@pytest.mark.parametrize("selection", ["peak_mass", "centroid"])
@pytest.mark.parametrize("expansion", ["centroid", "zero"])
def test_a_later_chunk_never_reaches_an_output(selection: str, expansion: str) -> None:
    qkv, options = inputs(), {**OPTIONS, "selection": selection, "expansion": expansion}
    before = muse_attention(*qkv, **options)
    for start in range(CHUNK, NUM_TOKENS, CHUNK):
        after = muse_attention(*changed(qkv, (Q, K, V), start), **options)
        assert torch.equal(before[:, :, :start], after[:, :, :start]), start


def test_the_gradient_of_an_output_stays_before_it() -> None:
    q, k, v = (x.requires_grad_() for x in inputs())
    out = muse_attention(q, k, v, **OPTIONS)
    for i in range(NUM_TOKENS - 1):
        for gradient in torch.autograd.grad(out[:, :, i].square().sum(), (q, k, v), retain_graph=True):
            assert (gradient[:, :, i + 1 :] == 0).all(), i
    assert (gradient != 0).any()


@pytest.mark.parametrize("order", [0, 1])
def test_with_clusters_held_nothing_later_reaches_an_output(order: int) -> None:
    qkv, options = inputs(), {**OPTIONS, "order": order}
    options["clusters"] = muse_clusters(*qkv[:2], **options)
    before = muse_attention(*qkv, **options)
    for i in range(NUM_TOKENS - 1):
        after = muse_attention(*changed(qkv, (Q, K, V), i + 1), **options)
        assert torch.equal(before[:, :, : i + 1], after[:, :, : i + 1]), i


@pytest.mark.parametrize("top_k", [0, 2])
def test_later_queries_of_the_own_chunk_can(top_k: int) -> None:
    """The statement is exact: this is what "otherwise" allows."""
    assert any(change for _, change in outputs_that_change(inputs(), (Q,), top_k=top_k))


def test_later_keys_of_the_own_chunk_move_the_retrieved_clusters_alone() -> None:
    qkv = inputs()
    assert any(change for _, change in outputs_that_change(qkv, (K,)))
    before, after = (muse_clusters(*x[:2], **OPTIONS) for x in (qkv, changed(qkv, (K,), 2 * CHUNK + 1, 3 * CHUNK)))
    row = 2
    assert torch.equal(before.query_order, after.query_order)
    assert torch.equal(before.mu, after.mu)
    assert torch.equal(before.key_order[:, :, :row], after.key_order[:, :, :row])
    assert not torch.equal(before.selected[:, :, row], after.selected[:, :, row])


@pytest.mark.parametrize("options", [{"selection": "centroid"}, {"top_k": 0}], ids=str)
def test_but_not_by_centroids(options: dict[str, object]) -> None:
    assert not any(change for _, change in outputs_that_change(inputs(), (K,), **options))


@pytest.mark.parametrize(
    "options", [{"top_k": 99}, {"key_cluster": 1, "summary_cluster": 1}, {"exact_below": 99}], ids=str
)
def test_in_the_exact_limits_later_tokens_change_rounding_only(options: dict[str, object]) -> None:
    qkv = [x.double() for x in inputs()]
    before = muse_attention(*qkv, **{**OPTIONS, **options})
    for i in range(NUM_TOKENS - 1):
        after = muse_attention(*changed(qkv, (Q, K, V), i + 1), **{**OPTIONS, **options})
        torch.testing.assert_close(before[:, :, : i + 1], after[:, :, : i + 1], rtol=1e-10, atol=1e-12)
