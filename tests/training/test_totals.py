"""Sums over batches, and where they start."""

from pathlib import Path
from types import SimpleNamespace

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


@pytest.mark.parametrize(
    ("data", "expected"),
    [(SimpleNamespace(ranks_per_block=2), [3.0, 6.0]), (SimpleNamespace(), [6.0, 12.0]), (None, [6.0, 12.0])],
    ids=["shared", "other-data", "no-data"],
)
def test_what_ranks_share_counts_once(data: object, expected: list[float]) -> None:
    """Six ranks with the same sums, which two of them at a time have from the same rows."""
    strategy = SimpleNamespace(reduce=lambda sums, reduce_op: 6 * sums)
    totals = Totals()
    totals.add(torch.tensor(1.0), torch.tensor(2))
    assert totals.collect(SimpleNamespace(strategy=strategy, datamodule=data)) == expected


def test_a_rank_without_batches_has_sums(tmp_path: Path) -> None:
    totals = Totals()
    totals.start(3, torch.device("cpu"))
    assert totals.collect(tiny_trainer(tmp_path)) == [0.0, 0.0, 0.0]
    with pytest.raises(ValueError, match="nothing was added"):
        totals.collect(tiny_trainer(tmp_path))
