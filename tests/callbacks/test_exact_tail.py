"""The tail of a training: which steps have exact attention, and that nothing else changes."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from muse_lightning.attention import Dense, SlidingWindow
from muse_lightning.callbacks import ExactTail
from muse_lightning.errors import UserError
from tests.tiny import TinyData, batches, tiny_model, tiny_muse, tiny_trainer


class Watch(L.Callback):
    """Which attention each optimizer step had."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, str]] = []

    def on_before_backward(self, trainer: L.Trainer, pl_module: Any, loss: torch.Tensor) -> None:
        self.seen.append((trainer.global_step, type(pl_module.llama.blocks[-1].self_attn.attention).__name__))


def fit(
    folder: Path, fraction: float, ckpt_path: str | None = None, max_steps: int = 10, **options: Any
) -> tuple[list[tuple[int, str]], Any]:
    torch.manual_seed(0)
    watch = Watch()
    model = tiny_model(attention=tiny_muse, **options)
    trainer = tiny_trainer(
        folder, max_steps=max_steps, callbacks=[ExactTail(fraction), watch], accumulate_grad_batches=2
    )
    trainer.fit(model, datamodule=TinyData(batches(40)), ckpt_path=ckpt_path, weights_only=True)
    return watch.seen, (model, trainer)


@pytest.mark.parametrize(("fraction", "first"), [(0.1, 9), (0.3, 7), (0.5, 5), (0.001, 9)])
def test_the_last_steps_are_exact(
    tmp_path: Path, fraction: float, first: int, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", "lightning.pytorch.utilities.rank_zero"):
        seen, _ = fit(tmp_path, fraction)
    said = [message for message in caplog.messages if "exact attention" in message]
    assert said == [f"step {first}: exact attention from here on"]
    assert seen == [(step, "Dense" if step >= first else "Muse") for step in range(10) for _ in range(2)]


def test_a_resumed_tail_goes_on(tmp_path: Path) -> None:
    _, (_, trainer) = fit(tmp_path, 0.5)
    trainer.save_checkpoint(tmp_path / "step=10.ckpt")
    seen, _ = fit(tmp_path, 0.5, ckpt_path=str(tmp_path / "step=10.ckpt"), max_steps=14)
    assert seen == [(step, "Dense") for step in range(10, 14) for _ in range(2)]


def test_exact_is_what_the_architecture_means(tmp_path: Path) -> None:
    _, (model, _) = fit(tmp_path, 0.5, config={"sliding_window": 20})
    strategy = model.llama.blocks[0].self_attn.attention
    assert isinstance(strategy, SlidingWindow)
    assert strategy.window == 20
    assert not isinstance(strategy, Dense)


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, 2.0])
def test_mistakes(fraction: float) -> None:
    with pytest.raises(UserError, match="fraction is"):
        ExactTail(fraction)
