"""Predictions on disk equal what the model computes."""

from pathlib import Path

import torch
from safetensors.torch import load_file

from muse_lightning.callbacks.prediction_files import PredictionFiles
from tests.tiny import TinyData, batches, tiny_model, tiny_trainer


def test_one_file_per_batch(tmp_path: Path) -> None:
    model, data = tiny_model(), batches(3)
    trainer = tiny_trainer(tmp_path, callbacks=[PredictionFiles(tmp_path / "out")])
    trainer.predict(model, datamodule=TinyData([], data), return_predictions=False)
    files = sorted((tmp_path / "out").iterdir())
    assert [file.name for file in files] == [f"batch={number:06d}_rank=0.safetensors" for number in range(3)]
    for file, batch in zip(files, data, strict=True):
        stored = load_file(file)
        torch.testing.assert_close(stored["log_likelihood"], -model.token_nats(batch).detach())
        assert torch.equal(stored["labels"], batch["labels"])
