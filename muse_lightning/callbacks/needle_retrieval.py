"""Can the model find one line in a long text? Needles made from validation documents, at several depths."""

import zlib
from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from muse_lightning.callbacks.figures import draw_curve, write_figure
from muse_lightning.errors import UserError
from muse_lightning.measure.needles import choose_needle, hide, longest_document
from muse_lightning.measure.token_scores import token_scores
from muse_lightning.training.module import LanguageModel
from muse_lightning.training.totals import Totals

_SMALLEST_CU_SEQLENS = 64


class NeedleRetrieval(L.Callback):
    """Hides a span of foreign tokens in validation documents, and asks for it at their end, at each validation.

    The haystack is the longest document of a row, T tokens. The needle is a span of `needle_tokens` from another
    document, of which neither half occurs in the haystack. It is inserted at a depth, a fraction of the haystack before
    the cue, and repeated at the end: its first half is the cue, its second half the answer; the end of the haystack
    makes room, so that there are T tokens again. The control is the haystack with cue and answer alone. Per token of
    the answers, over all rows and ranks:

        val/needle_accuracy_depth_K     the most likely token is the right one, needle at K percent
        val/needle_accuracy_control     the same without a needle
        val/needle_gain                 nats without a needle - nats with it, mean over depths
        val/needle_rows                 rows that were used
        val/needle_accuracy             a figure: accuracy over depth

    A row whose longest document is shorter than `min_share` of the context, or than 4 needles, is left out, as is one
    without a needle; a line says how many. Where a batch has no other document, needles are from the batch before. Each
    row takes one forward pass per depth and one for the control, with the attention that the model has.

    Args:
        depths: fractions from 0, the start of the document, to 1, right before the cue.
        needle_tokens: an even number.
        batches: batches of each rank to do it on.
        min_share: of the context length.
        seed: needles are chosen by it and by the haystack.
    Raises:
        UserError: a value out of range.

    Example:
        >>> trainer = L.Trainer(callbacks=[NeedleRetrieval()])
    """

    def __init__(
        self,
        depths: Sequence[float] = (0.1, 0.3, 0.5, 0.7, 0.9),
        needle_tokens: int = 32,
        batches: int = 1,
        min_share: float = 0.5,
        seed: int = 0,
    ) -> None:
        percents = [round(100 * depth) for depth in depths]
        if not depths or not all(0 <= depth <= 1 for depth in depths) or len(set(percents)) < len(percents):
            raise UserError(f"NeedleRetrieval: depths are {list(depths)}; accepted: different fractions from 0 to 1")
        if needle_tokens < 2 or needle_tokens % 2:
            raise UserError(f"NeedleRetrieval: needle_tokens is {needle_tokens}; accepted: an even number, at least 2")
        if batches < 1:
            raise UserError(f"NeedleRetrieval: batches is {batches}; it must be at least 1")
        if not 0 < min_share <= 1:
            raise UserError(f"NeedleRetrieval: min_share is {min_share}; it must be above 0 and at most 1")
        self.depths = list(depths)
        self.needle_tokens = needle_tokens
        self.batches = batches
        self.min_share = min_share
        self.seed = seed
        self._totals = Totals()
        self._done = 0
        self._before: list[Tensor] = []

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start from 0, on every rank: the sums are collected over all."""
        self._totals.start(2 + 2 * (1 + len(self.depths)), pl_module.device)
        self._done = 0
        self._before = []

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
        """Ask for needles in the rows of a batch."""
        assert isinstance(pl_module, LanguageModel)
        if self._done == self.batches:
            return
        rows = list(batch["input_ids"].cpu())
        offsets = batch["cu_seqlens"].cpu() if "cu_seqlens" in batch else None
        token_bytes = getattr(getattr(trainer, "datamodule", None), "token_bytes", None)
        is_text = None if token_bytes is None else token_bytes.cpu() > 0
        is_used = False
        for number, row in enumerate(rows):
            document = longest_document(offsets, number, len(row))
            haystack = row[document]
            pool = [*rows[:number], *rows[number + 1 :], row[: document.start], row[document.stop :]]
            if all(len(text) < self.needle_tokens for text in pool):
                pool = self._before
                if not pool:  # the first batch, of one document: the next one has needles for its own haystack
                    continue
            is_used = True
            needle = None
            if len(haystack) >= max(self.min_share * len(row), 4 * self.needle_tokens):
                generator = torch.Generator().manual_seed(self.seed + zlib.crc32(haystack.numpy().tobytes()))
                needle = choose_needle(pool, haystack, self.needle_tokens, generator, is_text)
            if needle is None:
                self._totals.add(
                    *torch.tensor([0.0, 1.0] + [0.0] * (2 + 2 * len(self.depths)), device=pl_module.device)
                )
                continue
            scores = []
            with trainer.precision_plugin.forward_context():
                for depth in (None, *self.depths):
                    scores += answer_scores(pl_module, hide(haystack, needle, depth), needle, offsets is not None)
            one = torch.ones((), device=pl_module.device)
            self._totals.add(one, one * 0, *scores)
        self._done += is_used
        self._before = rows

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log and draw."""
        rows, left_out, *scores = self._totals.collect(trainer)
        self._before = []
        if trainer.sanity_checking:
            return
        if not rows and not left_out:
            rank_zero_info("needle retrieval: left out, the validation has no second document to take needles from")
        if left_out:
            rank_zero_info(
                f"needle retrieval: {left_out:.0f} of {rows + left_out:.0f} rows left out: no document of "
                f"{self.min_share:g} of the context and {4 * self.needle_tokens} tokens, or no other text to hide in it"
            )
        if not rows:
            return
        answers = rows * (self.needle_tokens // 2)
        nats, hits = ([score / answers for score in scores[first::2]] for first in (0, 1))
        tags = {
            f"val/needle_accuracy_depth_{round(100 * d)}": hit for d, hit in zip(self.depths, hits[1:], strict=True)
        }
        gain = nats[0] - sum(nats[1:]) / len(self.depths)
        tags |= {"val/needle_accuracy_control": hits[0], "val/needle_gain": gain, "val/needle_rows": rows}
        pl_module.log_dict(tags, sync_dist=True)
        points = sorted(zip(self.depths, hits[1:], strict=True))
        figure = draw_curve(points, "depth of the needle", "accuracy of the answer's tokens", control=hits[0])
        write_figure(trainer, "val/needle_accuracy", figure)


def answer_scores(model: LanguageModel, tokens: Tensor, needle: Tensor, has_documents: bool) -> list[Tensor]:
    """Nats and hits, summed, of the second half of a needle that ends a text.

    Args:
        tokens: int64 [T].
        has_documents: attention is told where documents are, as in the batches of this model.
    """
    answer = needle[len(needle) // 2 :].to(model.device)
    options = {}
    if has_documents:
        ends = [0] + [len(tokens)] * (_SMALLEST_CU_SEQLENS - 1)
        options["cu_seqlens"] = torch.tensor(ends, dtype=torch.int32, device=model.device)
    hidden = model.llama.hidden_states(tokens[None].to(model.device), **options)[0]
    nats, is_top = token_scores(hidden[-len(answer) - 1 : -1], model.llama.lm_head.weight, answer)
    return [nats.sum(), is_top.sum()]
