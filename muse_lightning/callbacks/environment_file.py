"""Notes what a run runs on, and on which data."""

from collections.abc import Mapping
from typing import Any

import lightning as L

from muse_lightning.data import TokenDataModule
from muse_lightning.training.run_folder import RunFolder


class EnvironmentFile(L.Callback):
    """Writes `environment.json` once the data is known, before the first step.

    Of a run that goes on it is `environment.step=N.json`. `muse reproduce` compares them.

    Args:
        folder: of the run.
        environment: what is known before, as plain data.

    Example:
        >>> trainer = L.Trainer(callbacks=[EnvironmentFile(folder, environment())])  # doctest: +SKIP
    """

    def __init__(self, folder: RunFolder, environment: Mapping[str, Any]) -> None:
        self.folder = folder
        self.environment = environment

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Add the fingerprints of the datasets."""
        data = trainer.datamodule  # type: ignore[attr-defined]
        identity = data.identity() if isinstance(data, TokenDataModule) else None
        self.folder.write_environment({**self.environment, "data": identity})
