"""The error of attention is logged at validation, for approximations alone."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from muse_lightning.attention import Dense, Muse, SlidingWindow
from muse_lightning.callbacks import AttentionError
from muse_lightning.measure.attention_error import attention_errors
from tests.tiny import TinyData, batches, scalars, tiny_model, tiny_muse, tiny_trainer


def test_it_logs_the_error_on_the_first_batch(tmp_path: Path) -> None:
    trainer, model = tiny_trainer(tmp_path, callbacks=[AttentionError()]), tiny_model(attention=tiny_muse)
    model.configure_model()
    for block in model.llama.blocks:
        block.self_attn.q_proj.weight.data *= 1000  # fresh weights attend to everything alike, where nothing is lost
    val = batches(3, seed=1)
    trainer.validate(model, TinyData([], val), verbose=False)
    expected = attention_errors(model.llama, val[0]["input_ids"], val[0]["cu_seqlens"]).tolist()
    logged = scalars(trainer)
    assert all(error > 0.001 for error in expected)
    for layer, error in enumerate(expected):
        assert logged[f"muse/relative_error_layer_{layer}"][0][1] == pytest.approx(error)
    assert logged["muse/relative_error"][0][1] == pytest.approx(sum(expected) / 2)


@pytest.mark.parametrize(("precision", "dtype"), [("32-true", torch.float32), ("bf16-mixed", torch.bfloat16)])
def test_it_measures_in_the_precision_of_training(tmp_path: Path, precision: str, dtype: torch.dtype) -> None:
    seen: list[torch.dtype] = []

    class Watched(Muse):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
            seen.append(q.dtype)
            return super().forward(q, k, v, **options)

    trainer = tiny_trainer(tmp_path, callbacks=[AttentionError()], precision=precision)
    model = tiny_model(attention=partial(Watched, chunk=16, query_cluster=4, key_cluster=4), exact_val_batches=0)
    trainer.validate(model, TinyData([], batches(1)), verbose=False)
    assert seen == [dtype] * 4  # two layers, in the validation step and in the callback


@pytest.mark.parametrize(
    ("attention", "window", "is_silent"),
    [
        (Dense, None, True),
        (partial(SlidingWindow, window=9), 9, True),
        (partial(SlidingWindow, window=8), 9, False),
        (Dense, 9, False),
        (type("Derived", (Dense,), {}), None, False),
    ],
    ids=["dense", "window", "other-window", "dense-for-a-window", "derived"],
)
def test_it_is_silent_for_exact_attention(tmp_path: Path, attention: Any, window: int | None, is_silent: bool) -> None:
    trainer = tiny_trainer(tmp_path, callbacks=[AttentionError()])
    model = tiny_model(attention=attention, config={"sliding_window": window})
    trainer.validate(model, TinyData([], batches(1)), verbose=False)
    assert any(tag.startswith("muse/") for tag in scalars(trainer)) != is_silent
