"""TensorBoard's event files of a run, and nothing beside them."""

from lightning.fabric.loggers import TensorBoardLogger as Events
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only


class EventFiles(TensorBoardLogger):
    """Lightning's logger without `hparams.yaml`: a run's `config.yaml` has the configuration."""

    @rank_zero_only
    def save(self) -> None:
        """Flush the events."""
        Events.save(self)
