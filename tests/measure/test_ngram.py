"""Counts and bits per byte against a plain loop over tokens."""

import math
from collections import Counter

import numpy as np
import pytest

from muse_lightning.measure.ngram import MAX_BIGRAM_VOCAB, NgramCounts, ngram_bits_per_byte

VOCAB = 7
TOKEN_BYTES = np.array([1, 1, 2, 3, 1, 0, 1])


def random_blocks(seed: int, shape=(5, 40)) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    # Id 6 never occurs, so that smoothing has something to do.
    return rng.integers(0, VOCAB - 1, shape).astype(np.uint16), rng.random(shape) < 0.1


def pairs_of(tokens: np.ndarray, is_start: np.ndarray) -> list[tuple[int, int]]:
    return [
        (int(row[i - 1]), int(row[i]))
        for row, starts in zip(tokens, is_start, strict=True)
        for i in range(1, len(row))
        if not starts[i]
    ]


def test_counts():
    counts = NgramCounts(VOCAB)
    blocks = [random_blocks(0), random_blocks(1)]
    expected: Counter[tuple[int, int]] = Counter()
    for tokens, is_start in blocks:
        counts.add(tokens, is_start)
        expected.update(pairs_of(tokens, is_start))
    assert counts.tokens == expected.total()
    for pair in np.ndindex(VOCAB, VOCAB):
        assert counts.pairs[pair] == expected[pair]


def test_models_are_distributions():
    counts = NgramCounts(VOCAB)
    counts.add(*random_blocks(0))
    assert np.exp(-counts.unigram_nats()).sum() == pytest.approx(1)
    np.testing.assert_allclose(np.exp(-counts.bigram_nats()).sum(axis=1), 1)


def test_bits_per_byte_by_a_loop():
    train, held_out = NgramCounts(VOCAB), NgramCounts(VOCAB)
    train.add(*random_blocks(0))
    held_out.add(*random_blocks(1))
    seen, asked = pairs_of(*random_blocks(0)), pairs_of(*random_blocks(1))
    unigram, bigram, first = Counter(b for _, b in seen), Counter(seen), Counter(a for a, _ in seen)
    bits_1 = bits_2 = length = 0.0
    for a, b in asked:
        p = (unigram[b] + 1) / (len(seen) + VOCAB)
        bits_1 -= math.log2(p)
        bits_2 -= math.log2((bigram[a, b] + VOCAB * p) / (first[a] + VOCAB))
        length += TOKEN_BYTES[b]
    expected = (bits_1 / length, bits_2 / length)
    assert ngram_bits_per_byte(train, held_out, TOKEN_BYTES) == pytest.approx(expected)


def test_a_bigram_model_learns_what_a_unigram_model_cannot():
    tokens = np.tile(np.arange(4, dtype=np.uint16), (3, 500))
    starts = np.zeros_like(tokens, dtype=bool)
    train, held_out = NgramCounts(4), NgramCounts(4)
    train.add(tokens, starts)
    held_out.add(tokens[:1], starts[:1])
    unigram, bigram = ngram_bits_per_byte(train, held_out, np.ones(4, dtype=np.int64))
    assert unigram == pytest.approx(2, abs=1e-3)
    assert bigram < 0.02


def test_guards():
    with pytest.raises(ValueError, match=f"up to {MAX_BIGRAM_VOCAB} ids"):
        NgramCounts(MAX_BIGRAM_VOCAB + 1)
    with pytest.raises(ValueError, match="no bytes"):
        ngram_bits_per_byte(NgramCounts(VOCAB), NgramCounts(VOCAB), TOKEN_BYTES)
