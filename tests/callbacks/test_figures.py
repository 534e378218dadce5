"""Figures of validations: drawn in plain numbers, and nothing kept alive by it."""

import gc
import weakref
from io import BytesIO
from pathlib import Path

import pytest
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.backend_bases import FigureCanvasBase
from matplotlib.figure import Figure

from muse_lightning.callbacks.figures import draw_curve, write_figure
from tests.tiny import tiny_trainer


class Batch:
    """What a validation has in hand while it draws."""


def draw_with_a_batch(folder: Path, log_x: bool) -> "weakref.ref[Batch]":
    trainer = tiny_trainer(folder, logger=TensorBoardLogger(folder))
    batch = Batch()
    write_figure(trainer, "val/figure", draw_curve([(1.0, 2.0), (1024.0, 3.0)], "tokens", "nats", log_x=log_x))
    return weakref.ref(batch)


@pytest.mark.parametrize("log_x", [False, True], ids=["linear", "powers"])
def test_drawing_keeps_nothing_of_its_callers_alive(log_x: bool, tmp_path: Path) -> None:
    """A batch of data workers has open descriptors, and is freed with its last reference, not by the collector."""
    gc.disable()
    try:
        assert draw_with_a_batch(tmp_path, log_x)() is None
    finally:
        gc.enable()


def test_pixels_are_freed_when_they_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logger = TensorBoardLogger(tmp_path)
    canvases: list[weakref.ref[FigureCanvasBase]] = []
    add_figure = logger.experiment.add_figure

    def spied(tag: str, figure: Figure, step: int) -> None:
        add_figure(tag, figure, step)
        canvases.append(weakref.ref(figure.canvas))

    monkeypatch.setattr(logger.experiment, "add_figure", spied)
    gc.disable()
    try:
        write_figure(tiny_trainer(tmp_path, logger=logger), "a", draw_curve([(1.0, 2.0), (2.0, 3.0)], "x", "y"))
        assert [canvas() for canvas in canvases] == [None]
    finally:
        gc.enable()


def test_powers_of_two_are_numbers() -> None:
    figure = draw_curve([(1.0, 2.0), (1024.0, 3.0)], "tokens", "nats", log_x=True)
    figure.savefig(BytesIO(), format="png")
    labels = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert {"1", "1,024"} <= set(labels)
