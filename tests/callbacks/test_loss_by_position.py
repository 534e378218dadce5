"""Sums by context against a loop, and a figure in the event file."""

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from muse_lightning.callbacks import LossByPosition
from muse_lightning.callbacks.loss_by_position import draw, sums_by_context
from tests.tiny import SEQ_LEN, TinyData, batches, tiny_model, tiny_trainer


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "whole-rows"])
def test_sums_against_a_loop(packed):
    [batch] = batches(1, packed=packed)
    nats = torch.rand(2, SEQ_LEN).masked_fill(batch["labels"] == -100, 0.0)
    starts = set(batch["cu_seqlens"].tolist()) if packed else {0, SEQ_LEN}
    totals, counts = [0.0] * 6, [0] * 6
    in_sight = 0
    for index in range(2 * SEQ_LEN):
        in_sight = 1 if index in starts else in_sight + 1
        if batch["labels"].view(-1)[index] != -100:
            totals[in_sight.bit_length() - 1] += nats.view(-1)[index].item()
            counts[in_sight.bit_length() - 1] += 1

    found_totals, found_counts = sums_by_context(nats, batch)

    assert found_totals.tolist() == pytest.approx(totals, rel=1e-5)
    assert found_counts.tolist() == counts
    assert sum(counts) == (batch["labels"] != -100).sum()


def test_a_figure_per_validation(tmp_path):
    trainer = tiny_trainer(tmp_path, max_steps=2, val_check_interval=1, callbacks=[LossByPosition()])
    trainer.fit(tiny_model(), TinyData(batches(2), batches(2)))
    events = EventAccumulator(trainer.log_dir)
    events.Reload()
    assert [event.step for event in events.Images("val/loss_by_position")] == [1, 2]


def test_the_curve():
    [axes] = draw([(1, 3.0), (2, 2.5), (8, 2.0)]).axes
    [line] = axes.lines
    assert line.get_xydata().tolist() == [[1, 3.0], [2, 2.5], [8, 2.0]]
    assert axes.get_xscale() == "log"
