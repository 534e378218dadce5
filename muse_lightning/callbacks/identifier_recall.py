"""Does the model remember what another file has defined? Accuracy on names by the distance to their definition."""

from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from muse_lightning.callbacks.figures import draw_curve, write_figure
from muse_lightning.data.tokenizer import Tokenizer
from muse_lightning.errors import UserError
from muse_lightning.measure.identifiers import Mention, Separators, find_mentions
from muse_lightning.measure.token_scores import token_scores
from muse_lightning.training.module import LanguageModel
from muse_lightning.training.totals import Totals

_BUCKETS = 32
"""Powers of two of distances; the control comes behind them."""


class IdentifierRecall(L.Callback):
    """Scores identifiers that an earlier file of the repository has defined, at each validation.

    A name of at least 6 characters counts where it stands for the first time since the end of the file that defines it,
    at least `min_distance` tokens after its last mention there (`measure/identifiers.py` has the exact definition). The
    control is names that the document has not mentioned before. Scored are the tokens of a name after the first, which
    tells that it comes; per token, over all batches and ranks:

        val/identifier_accuracy     the most likely token is the right one
        val/identifier_nats         negative log-likelihood
        val/identifier_count        names, not tokens
        ..._D                       the same of names at a distance of at least D and less than 2 D tokens
        ..._control                 the same of the control
        val/identifier_recall       a figure: accuracy over distance

    Where no name counts, nothing is logged, the control neither, and a line says so.

    Args:
        min_distance: tokens.
        batches: first batches of each rank to do it on; each takes one forward pass more.
    Raises:
        UserError: a value below 1.

    Example:
        >>> trainer = L.Trainer(callbacks=[IdentifierRecall()])
    """

    def __init__(self, min_distance: int = 256, batches: int = 8) -> None:
        if min_distance < 1 or batches < 1:
            raise UserError(
                f"IdentifierRecall: min_distance is {min_distance}, batches {batches}; both must be at least 1"
            )
        self.min_distance = min_distance
        self.batches = batches
        self._totals = Totals()

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start from 0, on every rank: the sums are collected over all."""
        self._totals.start(4 * (_BUCKETS + 1), pl_module.device)

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
        """Find names in a batch, and score them in one forward pass."""
        assert isinstance(pl_module, LanguageModel)
        tokenizer = _tokenizer(trainer)
        if batch_idx >= self.batches or tokenizer is None:
            return
        separators = Separators(**tokenizer.special_ids)
        mentions = [
            find_mentions(row, tokenizer.token_texts, separators, self.min_distance)
            for row in batch["input_ids"].tolist()
        ]
        rows, tokens, buckets = _places(mentions)
        if not rows:
            return
        # Callbacks run outside the precision that the step ran in.
        with trainer.precision_plugin.forward_context():
            hidden = pl_module.llama.hidden_states(batch["input_ids"], cu_seqlens=batch.get("cu_seqlens"))
            at, row = torch.tensor(tokens, device=hidden.device), torch.tensor(rows, device=hidden.device)
            nats, is_top = token_scores(
                hidden[row, at - 1], pl_module.llama.lm_head.weight, batch["input_ids"][row, at]
            )
        sums = [
            np.bincount(buckets, weights, minlength=_BUCKETS + 1)
            for weights in (nats.double().cpu().numpy(), is_top.double().cpu().numpy(), None)
        ]
        names = np.bincount([_bucket(m) for row_mentions in mentions for m in row_mentions], minlength=_BUCKETS + 1)
        self._totals.add(
            *torch.tensor(np.concatenate([*sums, names]), device="cpu").to(pl_module.device, torch.float32)
        )

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log and draw."""
        nats, hits, tokens, names = np.array(self._totals.collect(trainer)).reshape(4, _BUCKETS + 1)
        if trainer.sanity_checking:
            return
        if _tokenizer(trainer) is None:
            rank_zero_info("identifier recall: left out, the data has no tokenizer")
            return
        if not names[:_BUCKETS].any():
            rank_zero_info(
                f"identifier recall: left out, no file mentions a name, at a distance of at least {self.min_distance} "
                "tokens, that an earlier file of its document defines"
            )
            return
        groups = {"": slice(0, _BUCKETS), "_control": slice(_BUCKETS, _BUCKETS + 1)}
        groups |= {f"_{2**i}": slice(i, i + 1) for i in range(_BUCKETS)}
        tags = {}
        for name, group in groups.items():
            if count := tokens[group].sum():
                tags[f"val/identifier_accuracy{name}"] = hits[group].sum() / count
                tags[f"val/identifier_nats{name}"] = nats[group].sum() / count
                tags[f"val/identifier_count{name}"] = names[group].sum()
        pl_module.log_dict({tag: float(value) for tag, value in tags.items()}, sync_dist=True)
        points = [(float(2**i), float(hits[i] / tokens[i])) for i in range(_BUCKETS) if tokens[i]]
        control = tags.get("val/identifier_accuracy_control")
        figure = draw_curve(
            points,
            "tokens since the defining file's last mention, from this power of two to the next",
            "accuracy of the name's tokens",
            log_x=True,
            control=None if control is None else float(control),
        )
        write_figure(trainer, "val/identifier_recall", figure)


def _tokenizer(trainer: L.Trainer) -> Tokenizer | None:
    return getattr(getattr(trainer, "datamodule", None), "tokenizer", None)


def _places(mentions: list[list[Mention]]) -> tuple[list[int], list[int], list[int]]:
    """Row, place and bucket of every token that is asked for."""
    found = [
        (row, token, _bucket(mention))
        for row, row_mentions in enumerate(mentions)
        for mention in row_mentions
        for token in range(mention.start, mention.stop)
    ]
    rows, tokens, buckets = ([place[i] for place in found] for i in range(3))
    return rows, tokens, buckets


def _bucket(mention: Mention) -> int:
    return _BUCKETS if mention.distance is None else mention.distance.bit_length() - 1
