"""Does a prediction profit from what comes after it? The same predictions at the end of the text."""

from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from muse_lightning.data.batches import IGNORED_LABEL, Batch, cut_at
from muse_lightning.errors import UserError
from muse_lightning.measure.token_scores import token_scores
from muse_lightning.training.module import LanguageModel
from muse_lightning.training.totals import Totals, ranks_per_block


class FutureGain(L.Callback):
    """Logs `val/future_gain`, nats per token that sight of the tokens behind it saves, at each validation.

        gain = mean over sampled tokens of (nats with the document ending at the token before - nats in the document)

    Exact attention is causal: 0. MuSe's clusters of queries, and which keys they retrieve, depend on later tokens of
    the same chunk (docs/attention.md, "Causality, stated exactly"). What that saves is in `val/loss`, but not in a text
    that is generated with this attention: a gain of more than a few of its standard errors is to be taken off. Part of
    it need not be learnt: with fewer queries in the last chunk, they are grouped otherwise. The gain of weights that
    were trained with exact attention, under this one, is that part.

    Sampled are labels of the second half of each row, where there is far context. Rows without documents
    (`data.document_mask: false`) are documents here, of which MuSe by default attends fewer exactly.

        val/future_gain         nats per token
        val/future_gain_error   its standard error over tokens

    Args:
        batches: first batches of each rank to do it on.
        tokens: of each row, no more than every row of the batch has; each takes one forward pass of the batch.
        seed: of the sample, which is the same on any number of ranks.
    Raises:
        UserError: a value below 1.

    Example:
        >>> trainer = L.Trainer(callbacks=[FutureGain()])
    """

    def __init__(self, batches: int = 8, tokens: int = 16, seed: int = 0) -> None:
        if batches < 1 or tokens < 1:
            raise UserError(f"FutureGain: batches is {batches}, tokens {tokens}; both must be at least 1")
        self.batches = batches
        self.tokens = tokens
        self.seed = seed
        self._totals = Totals()

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start from 0, on every rank: the sums are collected over all."""
        self._totals.start(3, pl_module.device)

    @torch.no_grad()
    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: dict[str, Tensor],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Run the model once for each sampled token, and once as it is: with documents as well, which make MuSe's
        kernels and `exact_below` others."""
        assert isinstance(pl_module, LanguageModel)
        input_ids, labels = batch["input_ids"], batch["labels"]
        seq_len = input_ids.shape[1]
        is_candidate = (labels != IGNORED_LABEL).cpu()
        is_candidate[:, : seq_len // 2] = False
        rows = is_candidate.any(1).nonzero()[:, 0]
        if batch_idx >= self.batches or not len(rows):
            return
        generator = torch.Generator().manual_seed(self.seed + _number_over_ranks(trainer, batch_idx))
        tokens = min(self.tokens, int(is_candidate[rows].sum(1).min()))
        drawn = is_candidate[rows].float().multinomial(tokens, generator=generator)
        rows, drawn = rows.to(labels.device), drawn.to(labels.device)
        head = pl_module.llama.lm_head.weight
        # Callbacks run outside the precision that the step ran in.
        with trainer.precision_plugin.forward_context():

            def nats(cuts: Tensor, row: Tensor, at: Tensor) -> Tensor:
                hidden = pl_module.llama.hidden_states(input_ids, cu_seqlens=cut_at(cast(Batch, batch), cuts))
                return token_scores(hidden[row, at], head, labels[row, at])[0]

            whole = nats(rows[:0], rows[:, None].expand_as(drawn).flatten(), drawn.flatten()).view_as(drawn)
            for at, as_it_is in zip(drawn.T, whole.T, strict=True):
                saved = nats(rows * seq_len + at + 1, rows, at) - as_it_is
                self._totals.add(saved.sum(), (saved**2).sum(), torch.ones_like(saved).sum())

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log it."""
        saved, squares, count = self._totals.collect(trainer)
        if trainer.sanity_checking:
            return
        if count < 2:
            rank_zero_info("future gain: left out, fewer than two tokens were sampled in the second halves of rows")
            return
        mean = saved / count
        error = (max(0.0, squares / count - mean**2) / (count - 1)) ** 0.5
        pl_module.log_dict({"val/future_gain": mean, "val/future_gain_error": error}, sync_dist=True)


def _number_over_ranks(trainer: L.Trainer, batch_idx: int) -> int:
    """Of a batch, as if one rank had them all; equal on ranks that share rows, which then sample the same tokens."""
    sharing = ranks_per_block(trainer)
    return batch_idx * (trainer.world_size // sharing) + trainer.global_rank // sharing
