"""Attention with a cache against the whole text at once, however it is cut into calls."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from muse_lightning.attention import Dense, SlidingWindow
from muse_lightning.attention import cached as cached_module
from muse_lightning.attention.cached import CachedAttention
from tests.assertions import assert_as_accurate

NUM_TOKENS = 37
CUTS = {
    "token-by-token": range(NUM_TOKENS + 1),
    "prompt-then-tokens": [0, 20, *range(21, NUM_TOKENS + 1)],
    "chunks": [0, 8, 16, 30, NUM_TOKENS],
    "at-once": [0, NUM_TOKENS],
}
WINDOWS = [None, 1, 5, 30, 100]


def whole(window: int | None) -> Dense | SlidingWindow:
    return Dense(0) if window is None else SlidingWindow(0, window)


def in_calls(attention: CachedAttention, qkv: list[Tensor], cuts: Any, **options: Any) -> Tensor:
    parts = [attention(*(x[:, :, a:b] for x in qkv), softmax_scale=0.3, **options) for a, b in itertools.pairwise(cuts)]
    return torch.cat(parts, dim=2)


def random_qkv(kv_heads: int = 2, head_dim: int = 8) -> list[Tensor]:
    return [torch.randn(2, heads, NUM_TOKENS, head_dim, dtype=torch.float64) for heads in (4, kv_heads, kv_heads)]


@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_calls_equal_the_whole(kv_heads: int, window: int | None, cuts: Any) -> None:
    qkv = random_qkv(kv_heads)
    out = in_calls(CachedAttention(0, window), qkv, cuts)
    torch.testing.assert_close(out, whole(window)(*qkv, softmax_scale=0.3))


@pytest.mark.parametrize("window", WINDOWS)
def test_masks_are_bounded(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits of 3 queries at a time, then fewer, against those of a whole chunk."""
    qkv = random_qkv()
    expected = whole(window)(*qkv, softmax_scale=0.3)
    monkeypatch.setattr(cached_module, "_LARGEST_LOGITS", 3 * 2 * 4 * 20)
    masks: list[Tensor] = []
    sdpa = torch.nn.functional.scaled_dot_product_attention

    def watched(*args: Any, **options: Any) -> Tensor:
        masks.append(options.get("attn_mask"))
        return sdpa(*args, **options)

    monkeypatch.setattr(cached_module.F, "scaled_dot_product_attention", watched)
    out = in_calls(CachedAttention(0, window), qkv, CUTS["chunks"])
    torch.testing.assert_close(out, expected)
    assert max(mask.numel() for mask in masks if mask is not None) <= 60
    assert len(masks) > 8


def test_a_window_bounds_the_cache() -> None:
    qkv = [x.repeat(1, 1, 20, 1) for x in random_qkv()]
    attention = CachedAttention(0, window=5)
    in_calls(attention, qkv, range(20 * NUM_TOKENS + 1))
    assert attention._keys is not None
    assert attention._keys.shape[2] <= 10
    everything = CachedAttention(0)
    in_calls(everything, qkv, range(20 * NUM_TOKENS + 1))
    assert everything._keys is not None
    assert everything.length == 20 * NUM_TOKENS <= everything._keys.shape[2] <= 40 * NUM_TOKENS


def test_it_has_no_state_dict_and_refuses_documents() -> None:
    attention = CachedAttention(0)
    qkv = random_qkv()
    in_calls(attention, qkv, [0, 4])
    assert not attention.state_dict()
    with pytest.raises(ValueError, match="cu_seqlens must be None"):
        in_calls(attention, qkv, [4, 8], cu_seqlens=torch.tensor([0, 4, 8], dtype=torch.int32))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("head_dim", [4, 64, 128])
def test_on_a_gpu(head_dim: int, kv_heads: int, window: int | None, cuts: Any, dtype: torch.dtype) -> None:
    qkv = [x.to(dtype) for x in random_qkv(kv_heads, head_dim)]
    actual = in_calls(CachedAttention(0, window), [x.cuda() for x in qkv], cuts)
    assert_as_accurate(
        actual,
        exact=whole(window)(*(x.double() for x in qkv), softmax_scale=0.3),
        baseline=whole(window)(*qkv, softmax_scale=0.3),
        # FlashAttention rounds the weights to the working dtype before the product with v; the CPU kernels do not.
        multiple=4.0,
        name="out",
    )
