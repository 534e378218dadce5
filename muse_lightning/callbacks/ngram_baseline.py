"""Ends a fit with three lines: what counting one token, counting two, and the trained model make of the same
held-out text."""

from collections.abc import Iterable
from itertools import islice

import lightning as L
import numpy as np
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from muse_lightning.data import TokenDataModule
from muse_lightning.data.block_reader import Block
from muse_lightning.errors import UserError
from muse_lightning.measure.ngram import MAX_BIGRAM_VOCAB, NgramCounts, ngram_bits_per_byte

_BLOCKS_AT_ONCE = 256


class NgramBaseline(L.Callback):
    """Compares the model's `val/bpb` with a unigram and a bigram model counted on the train split.

    Logs `baseline/unigram_bpb` and `baseline/bigram_bpb`, and prints them with the model's figure. All three are of
    the blocks that the last validation read. For small vocabularies, as that of `bytes`: a bigram table grows with its
    square.

    Args:
        max_train_tokens: most tokens of the train split to count: the first ones of its first epoch. With 0 both models
            are uniform.
    Raises:
        UserError: a value below 0.

    Example:
        >>> trainer = L.Trainer(callbacks=[NgramBaseline()])
    """

    def __init__(self, max_train_tokens: int = 20_000_000) -> None:
        if max_train_tokens < 0:
            raise UserError(f"NgramBaseline: max_train_tokens is {max_train_tokens}; accepted: at least 0")
        self.max_train_tokens = max_train_tokens
        self._validated_at = 0

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._validated_at = trainer.global_step

    @rank_zero_only
    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Count, log, print. Does nothing without a validation split."""
        data = trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(data, TokenDataModule) or "val/bpb" not in trainer.callback_metrics:
            print("n-gram baseline: skipped, there is no val/bpb to compare with")
            return
        if data.vocab_size > MAX_BIGRAM_VOCAB:
            print(f"n-gram baseline: skipped, a vocabulary of {data.vocab_size:,} is over {MAX_BIGRAM_VOCAB:,}")
            return
        train, held_out = NgramCounts(data.vocab_size), NgramCounts(data.vocab_size)
        _count(train, data.training_blocks(), self.max_train_tokens // (data.seq_len + 1))
        _count(held_out, data.validation_blocks(), _validated_blocks(trainer, data))
        unigram, bigram = ngram_bits_per_byte(train, held_out, data.token_bytes.numpy())
        for logger in trainer.loggers:
            logger.log_metrics(
                {"baseline/unigram_bpb": unigram, "baseline/bigram_bpb": bigram}, step=trainer.global_step
            )
        model = float(trainer.callback_metrics["val/bpb"])
        print(f"unigram model: {unigram:.3f} validation bits per byte")
        print(f"bigram model:  {bigram:.3f} validation bits per byte")
        when = (
            "" if self._validated_at == trainer.global_step else f" at step {self._validated_at}, its last validation"
        )
        print(f"this model:    {model:.3f} validation bits per byte{when}", flush=True)


def _count(counts: NgramCounts, blocks: Iterable[Block], limit: int) -> None:
    """Count at most `limit` blocks."""
    remaining = islice(blocks, limit)
    while group := list(islice(remaining, _BLOCKS_AT_ONCE)):
        tokens = np.stack([block.tokens.numpy() for block in group])
        is_start = np.zeros(tokens.shape, dtype=bool)
        for row, block in zip(is_start, group, strict=True):
            row[block.starts.numpy()] = True
        counts.add(tokens, is_start)


def _validated_blocks(trainer: L.Trainer, data: TokenDataModule) -> int:
    """How many blocks a validation reads: whole batches of all ranks, the first ones of its order; once, what several
    ranks share."""
    (batches,) = trainer.num_val_batches
    return int(batches) * data.batch_size * (trainer.world_size // data.ranks_per_block)
