"""The figure of a comparison: loss by position, error by head, mass by layer, loss against cost."""

import io
import math
import re
import textwrap
from collections.abc import Sequence
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg, RendererAgg
from matplotlib.figure import Figure, SubFigure
from matplotlib.text import Annotation, Text
from matplotlib.ticker import FormatStrFormatter, MaxNLocator, SymmetricalLogLocator
from matplotlib.transforms import Bbox

from muse_lightning.compare.results import Found

_LEAST_LABELS = 100
_LINEAR_BELOW = 1e-3
"""Of rises, nats: their scale is logarithmic above. Those of baselines are a hundred times those that are sought."""
_KEYS_OF_A_COLUMN = 26
_WORD = re.compile(r"\b[a-z_]+ ")
"""In the name of a point of the sweep, what is before each value; the same in all of them."""
_NEAR = (-4, -4)
"""Of a number, points from its dot."""
_MASS = {"own chunk": "tab:blue", "retrieved": "tab:orange", "summaries": "tab:green"}


def draw(found: Sequence[Found], recommended: Found | None, title: str) -> bytes:
    """A PNG. The first setting is exact attention, the second MuSe."""
    content = io.BytesIO()
    make_figure(found, recommended, title).savefig(content, format="png")
    return content.getvalue()


def make_figure(found: Sequence[Found], recommended: Found | None, title: str) -> Figure:
    """What `draw` draws."""
    figure = Figure(figsize=(13, 9.5), dpi=130, layout="constrained")
    halves: Any = figure.subfigures(2, 1, height_ratios=[4, 5])
    above, below = halves
    position, errors, mass = above.subplots(1, 3)
    cost = below.subplots()
    main = [each for each in found if not each.setting.is_swept]
    _draw_positions(position, main)
    _draw_errors(above, errors, main[1])
    _draw_mass(mass, main[1])
    notes = _draw_cost(cost, found[1:], recommended)
    figure.suptitle(title, fontsize=10)
    _draw_apart(figure, notes)
    return figure


def numbered(found: Sequence[Found], recommended: Found | None) -> list[Found]:
    """The points of the sweep that have a number: that which is recommended, and those that nothing else, rows
    included, is as cheap and as good as; in order of cost. Of equal ones the first."""
    in_order = sorted(found, key=lambda each: (each.cost, each.rise[0]))
    kept, least = [], math.inf
    for each in in_order:
        if each.setting.is_swept and (each is recommended or each.rise[0] < least):
            kept.append(each)
        least = min(least, each.rise[0])
    return kept


def _draw_positions(axes: Any, main: Sequence[Found]) -> None:
    exact = main[0].losses
    # Means of few tokens would set the scale.
    least = min(_LEAST_LABELS, sum(exact.counts) / 100)
    shown = [i for i, count in enumerate(exact.counts) if count >= least]
    for each in main[1:]:
        rises = [each.losses.by_context[i] - exact.by_context[i] for i in shown]
        axes.plot([2**i for i in shown], rises, marker="o", markersize=3, label=each.setting.name)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.set(xlabel="tokens in sight, from this power of two to the next", ylabel="rise of the loss, nats per token")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def _draw_errors(figure: SubFigure, axes: Any, muse: Found) -> None:
    axes.set(xlabel="query head", ylabel="layer", title=f"{muse.setting.name}: relative squared error of attention")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    if muse.errors is not None:
        figure.colorbar(axes.imshow(muse.errors, aspect="auto", cmap="viridis"), ax=axes)


def _draw_mass(axes: Any, muse: Found) -> None:
    axes.set(xlabel="layer", ylabel="share", title=f"{muse.setting.name}: where the softmax mass lies", ylim=(0, 1))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if muse.mass is None:
        return
    below = [0.0] * len(muse.mass)
    for i, (name, color) in enumerate(_MASS.items()):
        shares = [sum(head[i] for head in layer) / len(layer) for layer in muse.mass]
        axes.bar(range(len(shares)), shares, bottom=below, color=color, label=name)
        below = [sum(pair) for pair in zip(below, shares, strict=True)]
    axes.legend(fontsize=8, loc="lower right")


def _draw_cost(axes: Any, found: Sequence[Found], recommended: Found | None) -> list[Annotation]:
    """Rows have a colour, some points of the sweep a number, others are dots. Returns the numbers. Names stand beside:
    at their points they would hide each other."""
    axes.set_yscale("symlog", linthresh=_LINEAR_BELOW, linscale=0.5)
    is_timed = all(each.attention_ms is not None for each in found)
    keys: list[Any] = []
    notes: list[Annotation] = []
    for each in found:
        if each.setting.is_swept:
            axes.plot(each.cost, each.rise[0], ".", color="0.75")
        else:
            # The colours of the losses by position, which are of the same rows.
            keys += axes.plot(each.cost, each.rise[0], "o", color=f"C{len(keys)}", label=each.setting.name)
    if recommended is not None:
        ring = {"marker": "o", "markersize": 10, "markerfacecolor": "none", "color": "black", "linestyle": "none"}
        keys += axes.plot(recommended.cost, recommended.rise[0], label="recommended", **ring)
    best = numbered(found, recommended)
    for number, each in enumerate(best, start=1):
        label = f"{number}: {_WORD.sub('', each.setting.name)}"
        keys += axes.plot(each.cost, each.rise[0], ".", color="black", label=label)
        line = {"arrowstyle": "-", "linewidth": 0.4, "shrinkA": 0, "shrinkB": 0}
        place = {"xytext": _NEAR, "textcoords": "offset points", "ha": "right", "va": "top"}
        notes.append(axes.annotate(str(number), (each.cost, each.rise[0]), fontsize=7, arrowprops=line, **place))
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set(
        xlabel="a layer's attention, forward + backward, ms" if is_timed else "query-key pairs over exact attention's",
        ylabel="rise of the loss, nats per token",
    )
    axes.yaxis.set_major_locator(SymmetricalLogLocator(linthresh=_LINEAR_BELOW, base=10, subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    axes.grid(alpha=0.3)
    words = ", ".join(word.strip() for word in _WORD.findall(best[0].setting.name)) if best else ""
    title = textwrap.fill(f"numbers: {words}", 40) if words else None
    columns = {"ncols": math.ceil(len(keys) / _KEYS_OF_A_COLUMN), "loc": "upper left", "bbox_to_anchor": (1, 1)}
    axes.legend(handles=keys, fontsize=7, title=title, title_fontsize=7, alignment="left", **columns)
    return notes


def _draw_apart(figure: Figure, notes: Sequence[Annotation]) -> None:
    """Move numbers off each other. Left of a point that nothing beats, and below it, is room."""
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw_without_rendering()
    placed: list[Bbox] = []
    for note in notes:
        while any(_box(note, renderer).overlaps(other) for other in placed):
            x, y = note.xyann
            note.xyann = (x + _NEAR[0], y + _NEAR[1])
        placed.append(_box(note, renderer))


def _box(note: Annotation, renderer: RendererAgg) -> Bbox:
    """Of the text alone, without its line."""
    note.update_positions(renderer)
    return Text.get_window_extent(note, renderer)
