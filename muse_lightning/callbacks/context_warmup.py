"""Short contexts at the beginning of a training."""

import math
from contextlib import ExitStack
from typing import Any, cast

import lightning as L
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from muse_lightning.attention import exact_attention
from muse_lightning.data.batches import Batch, cut_documents
from muse_lightning.errors import UserError
from muse_lightning.training.log_step import ends_step, is_log_step
from muse_lightning.training.module import LanguageModel


class ContextWarmup(L.Callback):
    """Cuts the rows of the first steps into pieces that do not see each other, doubled until rows are whole.

    The first are of `start` tokens; they double at equal intervals. A model that sees tens of thousands of tokens from
    its first step on is slow to learn which of them matter. Tokens, their order and the shape of batches stay, and
    validation always has whole rows. Pieces are attended as packed documents are: by MuSe exactly, up to its
    `exact_below`. Logs `train/context`, the tokens of a piece, on every rank alike. A function of the optimizer step
    alone: a run that is resumed goes on where it was.

    Args:
        steps: optimizer steps until rows are whole.
        start: tokens of the first pieces.
        exact: attend exactly in every layer until the first step with whole rows, in validation too.
    Raises:
        UserError: a value below 1.
    Source: SkyLadder (arXiv 2503.15450), which lets the length grow linearly; Li et al. (arXiv 2108.06084).

    Example:
        >>> trainer = L.Trainer(callbacks=[ContextWarmup(steps=400)])
    """

    def __init__(self, steps: int, start: int = 2048, exact: bool = False) -> None:
        for name, value in (("steps", steps), ("start", start)):
            if value < 1:
                raise UserError(f"ContextWarmup: {name} is {value}; accepted: at least 1")
        self.steps = steps
        self.start = start
        self.exact = exact
        self._exact_attention: ExitStack | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Say when rows are whole: after how many steps, from the first one on, or never."""
        seq_len = getattr(pl_module, "seq_len", None)
        is_switched = self.exact and not getattr(pl_module, "attends_exactly", True)
        if seq_len is not None and self.start >= seq_len:
            rank_zero_info(
                f"ContextWarmup: rows are whole from the first step on; start is {self.start}, data.seq_len {seq_len}"
            )
        elif self.steps >= trainer.max_steps:
            rank_zero_info(
                f"ContextWarmup: rows are whole after {self.steps} steps; the training ends before, trainer.max_steps "
                f"is {trainer.max_steps}{', and attends exactly in every layer' * is_switched}"
            )
        elif seq_len is not None and trainer.global_step < self.steps:
            tokens = self.length(trainer.global_step, seq_len)
            rank_zero_info(
                f"ContextWarmup: rows are cut into pieces of {tokens:,} tokens, doubled until they are whole after "
                f"{self.steps} steps{'; every layer attends exactly until then' * is_switched}"
            )

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: dict[str, Any], batch_idx: int
    ) -> None:
        """Cut the batch, in place; or go back to the model's own attention, where it is whole."""
        seq_len = batch["input_ids"].shape[1]
        length = self.length(trainer.global_step, seq_len)
        if length == seq_len:
            if self._switch_back():
                rank_zero_info(
                    f"step {trainer.global_step}: rows are whole, and attended to as the recipe says from here on"
                )
            return
        batch["cu_seqlens"] = cut_documents(cast(Batch, batch), length)
        if self.exact:
            self._attend_exactly(pl_module)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: dict[str, Tensor], batch_idx: int
    ) -> None:
        """Log the length that the step had which has just ended."""
        if ends_step(trainer) and is_log_step(trainer, trainer.global_step):
            seq_len = batch["input_ids"].shape[1]
            pl_module.log("train/context", float(self.length(trainer.global_step - 1, seq_len)))

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Leave the model with its own attention, also where the training ended before."""
        self._switch_back()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """The same: Lightning tears nothing down then."""
        self._switch_back()

    def whole_from(self, seq_len: int) -> int:
        """The first optimizer step, from 0, with whole rows of `seq_len` tokens."""
        return self.steps if self.start < seq_len else 0

    def length(self, step: int, seq_len: int) -> int:
        """Tokens of a piece in optimizer step `step`, from 0, of rows of `seq_len`."""
        if self.start >= seq_len:
            return seq_len
        doublings = math.ceil(math.log2(seq_len / self.start))
        return min(seq_len, self.start << min(doublings, doublings * step // self.steps))

    def _attend_exactly(self, model: L.LightningModule) -> None:
        assert isinstance(model, LanguageModel)
        if not model.attends_exactly:
            self._exact_attention = ExitStack()
            self._exact_attention.enter_context(model.llama.attention_as(exact_attention(model.config.sliding_window)))

    def _switch_back(self) -> bool:
        """Whether there was anything to go back from."""
        switched, self._exact_attention = self._exact_attention, None
        if switched is None:
            return False
        switched.close()
        return True
