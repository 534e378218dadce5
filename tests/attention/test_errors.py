"""What a strategy refuses, in one line that names the option, the value and what is accepted."""

from collections.abc import Callable

import pytest

from muse_lightning.attention import AttentionStrategy, Dense, Muse, SlidingWindow, SpatialBlocks
from muse_lightning.errors import UserError


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Muse(0, chunk=100), "Muse: chunk / query_cluster must be a power of two, got chunk=100"),
        (lambda: Muse(0, selection="best"), "Muse: selection must be one of .*, centroid, got 'best'"),
        (lambda: SpatialBlocks(0, key_cluster=0), "SpatialBlocks: chunk / key_cluster must be a power of two"),
        (lambda: SlidingWindow(0, window=0), "SlidingWindow: window must be at least 1 token, got 0"),
        (
            lambda: Dense(0).check(seq_len=8, num_heads=3, num_kv_heads=2, head_dim=8),
            "num_attention_heads must be a multiple of num_key_value_heads, got 3 and 2",
        ),
        (
            lambda: AttentionStrategy(0).pairs([8]),
            r"base\.AttentionStrategy has no pairs\(\): write pairs\(self, lengths, \*, has_documents=False\), which",
        ),
        (
            lambda: AttentionStrategy(0)(None, None, None, softmax_scale=1.0),
            r"base\.AttentionStrategy has no forward\(\): write forward\(self, q, k, v, \*, softmax_scale, cu_seqlens=",
        ),
    ],
)
def test_a_wrong_option_is_named(make: Callable[[], object], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        make()
    assert "\n" not in str(error.value)
