"""Figures of evaluations, and where they are written."""

import lightning as L
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.backend_bases import FigureCanvasBase
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from muse_lightning.training.log_step import written_step


def draw_curve(
    points: list[tuple[float, float]], x_label: str, y_label: str, *, log_x: bool = False, control: float | None = None
) -> Figure:
    """A curve through points (x, y).

    Args:
        log_x: powers of two at equal distances.
        control: drawn as a dashed line at this height.
    """
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(*zip(*points, strict=True), marker="o")
    if control is not None:
        axes.axhline(control, linestyle="dashed", color="gray", label="control")
        axes.legend()
    if log_x:
        axes.set_xscale("log", base=2)
        # Plain numbers. Powers are drawn by a parser that leaves cycles of exceptions behind, which keep every frame
        # below alive, and in it the batch of the validation with its shared memory, until the collector comes by.
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(alpha=0.3)
    return figure


def write_figure(trainer: L.Trainer, tag: str, figure: Figure) -> None:
    """Write a figure to TensorBoard, on the first rank, at the step of the scalars that are logged with it.

    One step later it would be dropped when the run is resumed from the checkpoint of that validation.
    """
    for logger in trainer.loggers:
        if trainer.is_global_zero and isinstance(logger, TensorBoardLogger):
            logger.experiment.add_figure(tag, figure, written_step(trainer))
    # A figure and its canvas are cycles, with the pixels in them: dozens would wait for the collector.
    figure.clear()
    figure.set_canvas(FigureCanvasBase(figure))
