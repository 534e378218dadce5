"""The formula against torch's own counter, with attention in plain matrix products, and pairs against counting them."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from muse_lightning.attention import AttentionStrategy, Dense, SlidingWindow
from muse_lightning.data.batches import document_lengths
from muse_lightning.measure.flops import attention_flops_per_token, matrix_parameters, training_flops_per_token
from muse_lightning.model import Llama, LlamaConfig, load_preset
from tests.tiny import CONFIG, SEQ_LEN, VOCAB, batches, tiny_muse


class AllPairs(AttentionStrategy):
    """Every query with every key, by two matrix products: what the counter can count."""

    def forward(self, q, k, v, *, softmax_scale, cu_seqlens=None):
        groups = q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
        return torch.softmax(softmax_scale * q @ k.mT, dim=-1) @ v

    def pairs(self, lengths, *, has_documents=False):
        return float(sum(length**2 for length in lengths))


@pytest.mark.parametrize("features", [{}, {"attention_bias": True, "mlp_bias": True, "qk_norm": True}])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_formula_equals_the_counter(tied, features):
    llama = Llama(LlamaConfig(**CONFIG, tie_word_embeddings=tied, **features), AllPairs)
    llama.init_weights()
    input_ids = torch.randint(VOCAB, (3, SEQ_LEN))
    with FlopCounterMode(display=False) as counter:
        logits = llama(input_ids)
        F.cross_entropy(logits.flatten(0, 1), input_ids.flatten()).backward()
    expected = training_flops_per_token(llama, [SEQ_LEN] * 3) * 3 * SEQ_LEN
    assert counter.get_total_flops() == expected


def test_matrices_but_not_the_embedding():
    with torch.device("meta"):
        llama = Llama(load_preset("8b"), Dense)
    # 8.03B with 32 * 2 + 1 norms of 4,096, and an embedding of 128,256 x 4,096.
    assert matrix_parameters(llama) == 8_030_261_248 - 65 * 4096 - 128_256 * 4096


@pytest.mark.parametrize(
    ("strategy", "sees"),
    [(Dense(0), lambda age: True), (SlidingWindow(0, window=5), lambda age: age < 5)],
    ids=["dense", "window"],
)
def test_pairs_counted_one_by_one(strategy, sees):
    lengths = [1, 4, 5, 6, 23]
    counted = sum(sees(i - j) for length in lengths for i in range(length) for j in range(i + 1))
    assert strategy.pairs(lengths) == counted


@pytest.mark.parametrize("window", [None, 5], ids=["dense", "window"])
def test_flops_of_packed_documents_by_counting_pairs(window):
    """Each pair of a query and a key that it may see, over the whole batch."""
    attention = Dense if window is None else partial(SlidingWindow, window=window)
    with torch.device("meta"):
        llama = Llama(LlamaConfig(**CONFIG), attention)
    batch = batches(1, batch_size=3)[0]
    lengths = document_lengths(3, SEQ_LEN, batch["cu_seqlens"])
    position = torch.arange(3 * SEQ_LEN)
    document = torch.searchsorted(batch["cu_seqlens"], position.int(), right=True)
    age = position[:, None] - position
    sees = (document[:, None] == document) & (age >= 0) & (age < (window or len(age)))
    pairs = int(sees.sum())
    assert len(lengths) > 5
    # Forward a product of head_dim with each key and one with each value, 2 FLOPs a number; backward twice that.
    heads, head_dim, layers = 4, 4, 2
    of_attention = 3 * 2 * (2 * head_dim) * heads * layers * pairs
    of_weights = 6 * matrix_parameters(llama) * len(position)
    found = attention_flops_per_token(llama, lengths, has_documents=True)
    assert found * len(position) == pytest.approx(of_attention)
    whole = training_flops_per_token(llama, lengths, has_documents=True)
    assert whole * len(position) == pytest.approx(of_weights + of_attention)


def test_other_strategies_and_dense_equivalent():
    with torch.device("meta"):
        llama = Llama(LlamaConfig(**CONFIG), tiny_muse)
    lengths = [SEQ_LEN, 7]
    pairs = SEQ_LEN * (SEQ_LEN + 1) / 2 + 7 * 8 / 2
    per_pair = 12 * 4 * 4 * 2  # head_dim, heads, layers
    dense = 6 * matrix_parameters(llama) + per_pair * pairs / sum(lengths)
    assert training_flops_per_token(llama, lengths, [Dense(0)]) == pytest.approx(dense)
    own = 6 * matrix_parameters(llama) + per_pair * tiny_muse(0).pairs(lengths) / sum(lengths)
    assert training_flops_per_token(llama, lengths) == pytest.approx(own)
