"""A model of which two heads look for single tokens, trained and evaluated by a few steps."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from muse_lightning.callbacks import ContextWarmup
from muse_lightning.training.module import LanguageModel
from tests.tiny import TinyData, batches, tiny_model, tiny_muse, tiny_trainer

KV_HEADS = 2

SPREAD, SHARP = [(0,), (0,)], [(1,), (0,)]
"""Two heads by layer: evenly spread, and those of `sharp_model`."""


def heads_of(model: LanguageModel) -> list[tuple[int, ...]]:
    return [strategy.heads for strategy in model.partly_exact]


def sharp_model(**options: Any) -> LanguageModel:
    """Its first layer's second key-value head and its second layer's first look for single tokens; the others attend to
    everything alike, as fresh weights do, where an approximation loses nothing."""
    model = tiny_model(**({"attention": tiny_muse, "exact_heads": 2, "learning_rate": 1e-9} | options))
    torch.manual_seed(0)
    model.configure_model()
    for block, sharp in zip(model.llama.blocks, (1, 0), strict=True):
        weight = block.self_attn.q_proj.weight.data.unflatten(0, (KV_HEADS, -1))
        weight[sharp] *= 3000
    return model


class Watch(L.Callback):
    """What each step had."""

    def __init__(self) -> None:
        self.heads: list[list[tuple[int, ...]]] = []

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        assert isinstance(pl_module, LanguageModel)
        self.heads.append(heads_of(pl_module))


class ShortDocuments(L.Callback):
    """Of 12 tokens at first, of 24 and 48 in the second and third half of so many steps."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_train_batch_start(self, *step: Any) -> None:
        ContextWarmup(self.steps, start=12).on_train_batch_start(*step)


def checkpoint_of(model: LanguageModel, folder: Path, *callbacks: L.Callback, steps: int = 1) -> Path:
    trainer = tiny_trainer(folder, callbacks=list(callbacks), max_steps=steps)
    trainer.fit(model, TinyData(batches(6)))
    trainer.save_checkpoint(folder / "a.ckpt")
    return folder / "a.ckpt"


def lines_of_heads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is said of exact heads from now on."""
    found: list[str] = []
    for module in ("training", "callbacks"):
        monkeypatch.setattr(f"muse_lightning.{module}.exact_heads.rank_zero_info", found.append)
    return found
