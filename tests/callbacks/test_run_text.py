"""Texts beside the curves: what a run is, once for each start, and of a validation without a fit."""

from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from muse_lightning.callbacks import RunText
from tests.tiny import TinyData, batches, tiny_model, tiny_trainer


def texts(folder: Path) -> dict[str, list[tuple[int, str]]]:
    events = EventAccumulator(str(folder)).Reload()
    return {
        tag.removesuffix("/text_summary"): [
            (event.step, event.tensor_proto.string_val[0].decode()) for event in events.Tensors(tag)
        ]
        for tag in events.Tags()["tensors"]
    }


@pytest.mark.parametrize("verb", ["fit", "validate"])
def test_both_texts_once(tmp_path: Path, verb: str) -> None:
    environment: dict[str, Any] = {"command": ["muse", "fit"], "distributions": {"torch": "2.13.0"}}
    trainer = tiny_trainer(
        tmp_path, max_steps=2, val_check_interval=1, callbacks=[RunText("model:\n  weights: null\n", environment)]
    )
    getattr(trainer, verb)(tiny_model(), TinyData(batches(2), batches(1)))
    assert texts(Path(trainer.logger.log_dir)) == {
        "run/config": [(0, "```yaml\nmodel:\n  weights: null\n```")],
        "run/environment": [(0, '```json\n{\n  "command": [\n    "muse",\n    "fit"\n  ]\n}\n```')],
    }
