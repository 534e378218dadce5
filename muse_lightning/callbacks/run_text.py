"""What a run is, on TensorBoard's page "Text", beside the curves that it draws."""

import json
from collections.abc import Mapping
from typing import Any

import lightning as L
from lightning.pytorch.loggers import TensorBoardLogger

NOT_SHOWN = "distributions"
"""A hundred versions: `environment.json` has them."""


class RunText(L.Callback):
    """Writes the texts `run/config`, which is `config.yaml`, and `run/environment`, once for each start.

    They are at the step that it begins with.

    Args:
        config: YAML.
        environment: plain data.

    Example:
        >>> trainer = L.Trainer(callbacks=[RunText("seed_everything: 1", {"python": "3.12"})])
    """

    def __init__(self, config: str, environment: Mapping[str, Any]) -> None:
        shown = {name: value for name, value in environment.items() if name != NOT_SHOWN}
        self._texts = {
            "run/config": f"```yaml\n{config.rstrip()}\n```",
            "run/environment": f"```json\n{json.dumps(shown, indent=2)}\n```",
        }

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write them."""
        self._write(trainer)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write them, of a validation without a fit."""
        self._write(trainer)

    def _write(self, trainer: L.Trainer) -> None:
        texts, self._texts = self._texts, {}
        for logger in trainer.loggers:
            if trainer.is_global_zero and isinstance(logger, TensorBoardLogger):
                for tag, text in texts.items():
                    logger.experiment.add_text(tag, text, trainer.global_step)
