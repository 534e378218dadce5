"""The error of attention is logged at validation, for approximations alone."""

from pathlib import Path

import pytest

from muse_lightning.attention import Dense
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


def test_it_is_silent_for_exact_attention(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, callbacks=[AttentionError()])
    trainer.validate(tiny_model(attention=Dense), TinyData([], batches(1)), verbose=False)
    assert not any(tag.startswith("muse/") for tag in scalars(trainer))
