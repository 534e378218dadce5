"""Which heads attend exactly, in words: what a model takes from a checkpoint, and where it has them else."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import lightning as L
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info

from muse_lightning.attention.description import heads_in_words

if TYPE_CHECKING:
    from muse_lightning.training.module import LanguageModel


def evenly_spread(model: "LanguageModel") -> str:
    """How many are exact where none was chosen."""
    count = model.exact_heads
    return f"{count} {'head is' if count == 1 else 'heads are'} exact, evenly spread"


def take_heads(
    model: "LanguageModel", heads: Mapping[int, Sequence[int]], trainer: L.Trainer | None, *, are_chosen: bool
) -> None:
    """Make those heads exact that were in the training of a checkpoint, if it had as many in the same layers. Says
    which where they were chosen or this is an evaluation, and where a choice is not used, unless all is exact.

    Args:
        heads: as in `LanguageModel.chosen_heads`; none where the training had none.
        trainer: the one that loads the checkpoint, if one does.
        are_chosen: whether that training had chosen them.
    """
    here = model.chosen_heads
    is_taken = bool(heads) and heads.keys() == here.keys() and _count(heads) == model.exact_heads
    if is_taken:
        model.choose_heads(heads, is_choice=are_chosen)
    if _is_exact_everywhere(model):
        return
    checkpoint = f"checkpoint {trainer.ckpt_path}" if trainer is not None and trainer.ckpt_path else "the checkpoint"
    is_evaluation = trainer is not None and trainer.state.fn != TrainerFn.FITTING
    is_spread = is_evaluation and model.has_choice and not is_taken and not model.are_heads_chosen
    if are_chosen and heads and not is_taken:
        rank_zero_info(
            f"{checkpoint}: the exact heads of its training are not used: {_counted(heads)} there, {_counted(here)} "
            f"here{', evenly spread' * is_spread} (model.exact_heads, model.exact_layers)"
        )
    elif is_taken and (is_evaluation or are_chosen):
        rank_zero_info(
            f"model.exact_heads: exact key-value heads by layer: {heads_in_words(heads)}, as the checkpoint has them"
            f"{'; its training had not chosen any' * (not are_chosen)}"
        )
    elif is_spread:
        rank_zero_info(f"model.exact_heads: {evenly_spread(model)}; {checkpoint} has no choice of its training")


def say_if_spread(model: "LanguageModel") -> None:
    """Say so where an evaluation without a checkpoint has heads that no training chose."""
    trainer = model.trainer
    is_loaded = trainer.state.fn == TrainerFn.FITTING or trainer.ckpt_path is not None
    if model.has_choice and not model.are_heads_chosen and not is_loaded:
        rank_zero_info(
            f"model.exact_heads: {evenly_spread(model)}; a training's choice comes with its checkpoint (--ckpt_path), "
            "for as many heads in the same layers"
        )


def _is_exact_everywhere(model: "LanguageModel") -> bool:
    return model.attends_exactly or bool(model.partly_exact and not model.has_choice)


def _count(heads: Mapping[int, Sequence[int]]) -> int:
    return sum(map(len, heads.values()))


def _counted(heads: Mapping[int, Sequence[int]]) -> str:
    if not heads:
        return "none"
    count = _count(heads)
    return f"{count} head{'s' * (count != 1)} of layer{'s' * (len(heads) != 1)} {', '.join(map(str, heads))}"
