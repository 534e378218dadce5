"""Sums over batches, and where they start."""

from pathlib import Path

import pytest
import torch

from muse_lightning.training.totals import Totals
from tests.tiny import tiny_trainer


def test_sums_start_from_nothing(tmp_path: Path) -> None:
    trainer, totals = tiny_trainer(tmp_path), Totals()
    totals.add(torch.tensor(5.0), torch.tensor(7.0))  # of an epoch that was interrupted
    totals.start(2, torch.device("cpu"))
    assert totals
    for _ in range(3):
        totals.add(torch.tensor(0.25), torch.tensor(2))
    assert totals.collect(trainer) == [0.75, 6.0]
    assert not totals


def test_a_rank_without_batches_has_sums(tmp_path: Path) -> None:
    totals = Totals()
    totals.start(3, torch.device("cpu"))
    assert totals.collect(tiny_trainer(tmp_path)) == [0.0, 0.0, 0.0]
    with pytest.raises(ValueError, match="nothing was added"):
        totals.collect(tiny_trainer(tmp_path))
