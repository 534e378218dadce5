"""Only events are left in the folder."""

from pathlib import Path

import pytest
from lightning.pytorch.loggers import TensorBoardLogger

from muse_lightning.training.event_files import EventFiles


@pytest.mark.parametrize(("kind", "others"), [(EventFiles, []), (TensorBoardLogger, ["hparams.yaml"])])
def test_nothing_beside_events(tmp_path: Path, kind: type[TensorBoardLogger], others: list[str]) -> None:
    logger = kind(tmp_path, name="run", version="version_0")
    logger.log_metrics({"train/loss": 1.0}, step=1)
    logger.save()
    names = sorted(path.name for path in Path(logger.log_dir).iterdir())
    assert [name for name in names if not name.startswith("events.out.tfevents.")] == others
    assert len(names) == len(others) + 1
