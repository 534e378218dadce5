"""What a LanguageModel and its Trainer are asked for, before anything is made."""

import warnings
from typing import TYPE_CHECKING

import lightning as L
from lightning.pytorch.callbacks import Timer

from muse_lightning.attention.base import check_is_whole
from muse_lightning.errors import UserError
from muse_lightning.training.optim import check_max_steps
from muse_lightning.training.trainer_callbacks import callbacks_of

if TYPE_CHECKING:
    from muse_lightning.training.module import LanguageModel


def check_ranges(model: "LanguageModel") -> None:
    """Values that no model may have.

    Raises:
        UserError: names the first, and what is accepted.
    """
    accepted = {
        "residual_dtype": (model.residual_dtype in ("parameters", "autocast"), "parameters or autocast"),
        "optimizer": (model.optimizer in ("adamw", "muon"), "adamw or muon"),
        "learning_rate": (model.learning_rate > 0, "above 0"),
        "weight_decay": (model.weight_decay >= 0, "at least 0"),
        "betas": (all(0 <= beta < 1 for beta in model.betas), "at least 0 and below 1, both"),
        "eps": (model.eps > 0, "above 0"),
        "momentum": (0 <= model.momentum < 1, "at least 0 and below 1"),
        "warmup_steps": (model.warmup_steps >= 0, "at least 0"),
        "schedule": (model.schedule in ("cosine", "wsd"), "cosine or wsd"),
        "decay_fraction": (0 <= model.decay_fraction <= 1, "between 0 and 1"),
        "min_lr_ratio": (0 <= model.min_lr_ratio <= 1, "between 0 and 1"),
        "recompute_every": (model.recompute_every >= 1, "at least 1"),
        "mlp_tiles": (model.mlp_tiles >= 1, "at least 1"),
        "loss_chunk": (model.loss_chunk >= 1, "at least 1"),
        "exact_val_batches": (model.exact_val_batches >= 0, "at least 0"),
    }
    for name, (is_accepted, text) in accepted.items():
        if not is_accepted:
            raise UserError(f"model.{name} is {getattr(model, name)!r}; accepted: {text}")
    of_recompute = {"recompute_every": model.recompute_every > 1, "offload": model.offload}
    for name, is_set in of_recompute.items():
        if is_set and model.recompute == "none":
            value = str(getattr(model, name)).lower()
            wanted = "accepted with model.recompute block or keep_attention"
            raise UserError(f"model.{name} is {value}; {wanted}, found none")


def check_sizes(model: "LanguageModel") -> None:
    """Tokenizer and context against architecture and attention.

    Raises:
        UserError: names what is too large, or does not fit together.
    """
    config = model.config
    if model.tokenizer_size is not None and model.tokenizer_size > config.vocab_size:
        raise UserError(
            f"model.config.vocab_size is {config.vocab_size}; the tokenizer has {model.tokenizer_size} ids, so at "
            f"least {model.tokenizer_size} are needed"
        )
    if model.seq_len is None:
        return
    if model.mlp_tiles > model.seq_len:
        raise UserError(f"model.mlp_tiles is {model.mlp_tiles}; accepted: 1 to data.seq_len, {model.seq_len}")
    if model.seq_len > config.max_position_embeddings:
        raise UserError(
            f"data.seq_len is {model.seq_len}; model.config.max_position_embeddings allows at most "
            f"{config.max_position_embeddings}"
        )
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for block in model.llama.blocks:
            check_is_whole(block.self_attn.attention)
            block.self_attn.attention.check(
                seq_len=model.seq_len,
                num_heads=config.num_attention_heads,
                num_kv_heads=config.num_key_value_heads,
                head_dim=config.attention_head_dim,
            )
    for message, category in dict.fromkeys((str(each.message), each.category) for each in said):  # of all layers, once
        warnings.warn(message, category, stacklevel=2)


def check_trainer(trainer: L.Trainer) -> None:
    """How long a training is, its steps, and how often it is evaluated, as far as that does not depend on data.

    Raises:
        UserError: names what Lightning would only refuse, or fail at, once the data is there.
    """
    check_max_steps(trainer.max_steps)
    _check_max_time(trainer)
    for name in ("accumulate_grad_batches", "check_val_every_n_epoch"):
        value = getattr(trainer, name)
        if value is not None and value < 1:
            raise UserError(f"trainer.{name}: {value} found; accepted: a number, at least 1")
    # A float is a part of an epoch; a trainer that validates by the clock has none.
    interval, limit = getattr(trainer, "val_check_interval", None), trainer.limit_train_batches
    if limit == 0:
        raise UserError(
            "trainer.limit_train_batches: 0 found, nothing would be trained; accepted: a number of batches, at least "
            "1, or a part of an epoch"
        )
    if trainer.limit_val_batches == 0 or not isinstance(interval, int):
        return
    if interval == 0:
        raise UserError(
            "trainer.val_check_interval: 0 found; accepted: a number of batches, at least 1, or a part of an epoch"
        )
    if isinstance(limit, int) and interval > limit > 0 and trainer.check_val_every_n_epoch is not None:
        raise interval_beyond_epoch(interval, limit)


def _check_max_time(trainer: L.Trainer) -> None:
    """`trainer.max_time` is a `Timer`, unless one is among the callbacks, which wins."""
    for timer in callbacks_of(trainer, Timer):
        seconds = timer.time_remaining()
        if seconds is not None and seconds <= 0:
            raise UserError(
                f"trainer.max_time, or Timer's duration: {seconds:g} seconds found, no time to train; accepted: above "
                "0, such as 00:08:00:00 (days, hours, minutes, seconds)"
            )


def interval_beyond_epoch(interval: object, batches: int | str) -> UserError:
    """The mistake where a validation would come after more batches than an epoch has."""
    return UserError(
        f"trainer.val_check_interval: {interval} found, an epoch has {batches} batches; give at most that, or "
        "trainer.check_val_every_n_epoch=null to count over epochs"
    )
