"""The figure of a comparison: loss by position, error by head, mass by layer, loss against cost."""

import io
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from muse_lightning.compare.results import Found

_LEAST_LABELS = 100
_MASS = {"own chunk": "tab:blue", "retrieved": "tab:orange", "summaries": "tab:green"}


def draw(found: Sequence[Found], title: str) -> bytes:
    """A PNG. The first setting is exact attention, the second MuSe."""
    figure = Figure(figsize=(12, 8), layout="constrained")
    position, errors, mass, cost = figure.subplots(2, 2).flatten()
    main = [each for each in found if not each.setting.is_swept]
    _draw_positions(position, main)
    _draw_errors(figure, errors, main[1])
    _draw_mass(mass, main[1])
    _draw_cost(cost, found[1:])
    figure.suptitle(title, fontsize=10)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=130)
    return content.getvalue()


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


def _draw_errors(figure: Figure, axes: Any, muse: Found) -> None:
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


def _draw_cost(axes: Any, found: Sequence[Found]) -> None:
    is_timed = all(each.attention_ms is not None for each in found)
    for each in found:
        place = (each.cost, each.rise[0])
        axes.plot(*place, "." if each.setting.is_swept else "o")
        # Names of what is both dearer and worse than something else would hide those that matter.
        if each.setting.is_swept and any(other.cost < each.cost and other.rise[0] < each.rise[0] for other in found):
            continue
        note = axes.annotate(each.setting.name, place, fontsize=6, xytext=(3, 3), textcoords="offset points")
        note.set_in_layout(False)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set(
        xlabel="a layer's attention, forward + backward, ms" if is_timed else "query-key pairs over exact attention's",
        ylabel="rise of the loss, nats per token",
    )
    axes.grid(alpha=0.3)
