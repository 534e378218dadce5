"""Sums by context against a loop, and a figure in the event file."""

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from muse_lightning.callbacks import LossByPosition
from muse_lightning.callbacks.figures import draw_curve
from muse_lightning.callbacks.loss_by_position import sums_by_context
from muse_lightning.errors import UserError
from tests.tiny import SEQ_LEN, TinyData, batches, scalars, tiny_model, tiny_trainer


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


def test_a_figure_and_its_points_per_validation(tmp_path):
    trainer = tiny_trainer(tmp_path, max_steps=2, val_check_interval=1, callbacks=[LossByPosition()])
    model, val = tiny_model(), batches(2)
    trainer.fit(model, TinyData(batches(2), val))
    events = EventAccumulator(trainer.log_dir)
    events.Reload()
    validations = [event.step for event in events.Scalars("val/loss")]
    assert [event.step for event in events.Images("val/loss_by_position")] == validations == [0, 1]
    sums = [torch.stack(sums_by_context(model.token_nats(batch), batch)) for batch in val]
    nats, counts = sum(sums)
    for i, mean in enumerate((nats / counts).tolist()):
        points = events.Scalars(f"val/loss_by_position/{2**i}")
        assert [point.step for point in points] == validations
        assert points[-1].value == pytest.approx(mean, rel=1e-5)


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "whole-rows"])
@pytest.mark.parametrize("short", [1, 7, 2048])
def test_short_and_long_contexts(tmp_path, packed, short):
    model, val = tiny_model(), batches(3, packed=packed)
    trainer = tiny_trainer(tmp_path, callbacks=[LossByPosition(short_context=short)])
    trainer.validate(model, TinyData([], val), verbose=False)
    losses = {"val/loss_short": [], "val/loss_long": []}
    for batch in val:
        nats = model.token_nats(batch)
        starts = set(batch["cu_seqlens"].tolist()) if packed else {0, SEQ_LEN}
        in_sight = 0
        for index in range(2 * SEQ_LEN):
            in_sight = 1 if index in starts else in_sight + 1
            if batch["labels"].view(-1)[index] != -100:
                losses["val/loss_short"] += [nats.view(-1)[index].item()] if in_sight <= short else []
                losses["val/loss_long"] += [nats.view(-1)[index].item()] if in_sight > SEQ_LEN / 2 else []
    logged = scalars(trainer)
    for tag, values in losses.items():
        assert logged[tag][0][1] == pytest.approx(sum(values) / len(values), rel=1e-5), tag


def test_no_long_document_no_loss_of_one(tmp_path):
    [batch] = batches(1, packed=False)
    batch["cu_seqlens"] = torch.tensor([*range(0, 2 * SEQ_LEN, 8), *[2 * SEQ_LEN] * 52], dtype=torch.int32)
    trainer = tiny_trainer(tmp_path, callbacks=[LossByPosition()])
    trainer.validate(tiny_model(), TinyData([], [batch]), verbose=False)
    assert "val/loss_short" in scalars(trainer)
    assert "val/loss_long" not in scalars(trainer)


def test_mistakes():
    with pytest.raises(UserError, match="LossByPosition: short_context is 0; it must be at least 1 token"):
        LossByPosition(short_context=0)


def test_the_curve():
    [axes] = draw_curve([(1, 3.0), (2, 2.5), (8, 2.0)], "x", "y", log_x=True).axes
    [line] = axes.lines
    assert line.get_xydata().tolist() == [[1, 3.0], [2, 2.5], [8, 2.0]]
    assert axes.get_xscale() == "log"


def test_a_curve_with_its_control():
    [axes] = draw_curve([(0.1, 1.0)], "depth", "accuracy", control=0.25).axes
    assert (axes.get_xscale(), axes.get_xlabel(), axes.get_ylabel()) == ("linear", "depth", "accuracy")
    assert axes.lines[1].get_ydata() == [0.25, 0.25]
