"""Unigram and bigram models of tokens: what a trained model must beat, in bits per byte, at the price of counting.

Legend: n blocks of L tokens, V vocabulary.
"""

import math

import numpy as np

# A bigram table has V * V counts of 8 bytes: 134 MB here, and 34 GB for a vocabulary of 65,536.
MAX_BIGRAM_VOCAB = 4096


class NgramCounts:
    """Exact counts of tokens and of pairs of neighbours, and the two models made of them.

    A position counts as it is trained on: every token but a block's first and a document's first is predicted, from
    the token before it.
    """

    def __init__(self, vocab_size: int) -> None:
        """
        Args:
            vocab_size: V; every id is smaller.
        Raises:
            ValueError: the table of pairs would be too large.
        """
        if vocab_size > MAX_BIGRAM_VOCAB:
            raise ValueError(f"vocab_size {vocab_size}: a bigram table is counted up to {MAX_BIGRAM_VOCAB} ids only")
        self.vocab_size = vocab_size
        self.pairs = np.zeros((vocab_size, vocab_size), dtype=np.int64)

    @property
    def tokens(self) -> int:
        """Number of predicted tokens counted so far."""
        return int(self.pairs.sum())

    def add(self, tokens: np.ndarray, is_start: np.ndarray) -> None:
        """Count blocks.

        Args:
            tokens: [n, L] of any integer type.
            is_start: [n, L] bool, true where a document begins.
        """
        keys = tokens[:, :-1].astype(np.int64) * self.vocab_size + tokens[:, 1:]  # [n, L - 1]
        keys = keys[~is_start[:, 1:]]
        size = self.vocab_size**2
        self.pairs += np.bincount(keys, minlength=size).reshape(self.pairs.shape)

    def unigram_nats(self, alpha: float = 1.0) -> np.ndarray:
        """[V] float64: -log p(token) with add-alpha smoothing, p = (count + alpha) / (total + alpha V)."""
        counts = self.pairs.sum(axis=0)
        return np.log(counts.sum() + alpha * self.vocab_size) - np.log(counts + alpha)

    def bigram_nats(self, alpha: float = 1.0) -> np.ndarray:
        """[V, V] float64: -log p(token | token before), interpolated with the unigram model.

        p(b | a) = (count(a, b) + alpha V p(b)) / (count(a) + alpha V): the unigram model's opinion weighs as much as
        alpha counts per id, so that a pair never seen is as likely as its second token is.
        """
        prior = alpha * self.vocab_size
        weights = self.pairs + prior * np.exp(-self.unigram_nats(alpha))
        return np.log(self.pairs.sum(axis=1, keepdims=True) + prior) - np.log(weights)


def ngram_bits_per_byte(train: NgramCounts, held_out: NgramCounts, token_bytes: np.ndarray) -> tuple[float, float]:
    """Bits per byte of the unigram and the bigram model of `train` on the tokens of `held_out`.

    Bits of all predicted tokens over the bytes of their text; special tokens cost bits and have no bytes.

    Args:
        train: What the models are made of.
        held_out: What they are asked to predict.
        token_bytes: int [V]: bytes of text of each id.
    Returns:
        Unigram, bigram.
    Raises:
        ValueError: `held_out` has no bytes of text.
    """
    counts = held_out.pairs.sum(axis=0)
    total_bytes = int(counts @ token_bytes)
    if total_bytes == 0:
        raise ValueError("held_out has no bytes of text")
    unigram = float(counts @ train.unigram_nats())
    bigram = float((held_out.pairs * train.bigram_nats()).sum())
    return unigram / (math.log(2) * total_bytes), bigram / (math.log(2) * total_bytes)
