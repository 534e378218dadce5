"""What the figure names, and that it can be read."""

import io
import math
from itertools import combinations

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.image import imread
from matplotlib.text import Annotation, Text

from muse_lightning.compare.figure import draw, make_figure, numbered
from muse_lightning.compare.losses import Losses
from muse_lightning.compare.results import Found, cheapest
from muse_lightning.compare.settings import Grid, Setting, make_settings
from tests.compare.conftest import KV_HEADS, MUSE

GRID = Grid(
    chunk=(16, 32, 64, 128), query_cluster=(8,), key_cluster=(4,), top_k=(1, 2, 3, 4, 6), summary_cluster=(4, 8)
)
# Its summaries are smaller than those of the rows, so that all 40 points stay.
ROWS = make_settings(MUSE, 12, None, GRID, 8, KV_HEADS, (0,), 1)
SWEPT = [setting for setting in ROWS if setting.is_swept]
MAIN = ROWS[: len(ROWS) - len(SWEPT)]


def found(setting: Setting, cost: float, rise: float) -> Found:
    losses = Losses([3.0 + rise], [1], [1], [3.0 + rise] * 4, [100] * 4)
    return Found(setting, losses, (rise, 0.0001), 0.5, attention_ms=cost)


def sweep(unbeaten_every: int) -> list[Found]:
    """The rows, dear ones of the baselines among them, and 40 points, so close to each other that text at each would be
    one black bar; of so many of them, one is not worse than what is cheaper."""
    rows = [found(setting, 10.0 - i, 0.2 * i) for i, setting in enumerate(MAIN)]
    points = [
        found(setting, 3.0 + 0.01 * i, 0.05 if i % unbeaten_every else 0.04 * 0.95**i)
        for i, setting in enumerate(SWEPT)
    ]
    return rows + points


def test_numbers_are_of_what_nothing_beats() -> None:
    everything = sweep(2)
    points = everything[len(MAIN) :]
    assert len(points) == 40
    assert numbered(everything[1:], None) == points[::2]


def test_the_recommended_point_has_a_number_whatever_beats_it() -> None:
    everything = sweep(2)
    points = everything[len(MAIN) :]
    assert numbered(everything[1:], points[3]) == [points[0], points[2], points[3], *points[4::2]]


def test_a_row_beats_points_and_is_no_point() -> None:
    row, dearer, cheaper = found(MAIN[1], 2.0, 0.01), found(SWEPT[0], 3.0, 0.02), found(SWEPT[1], 1.0, 0.02)
    assert numbered([row, dearer, cheaper], None) == [cheaper]


def test_of_equal_points_one_has_a_number_and_of_equally_dear_ones_the_better() -> None:
    first, equal, worse, nan = (
        found(setting, 1.0, rise) for setting, rise in zip(SWEPT, (0.01, 0.01, 0.02, math.nan), strict=False)
    )
    assert numbered([worse, first, equal, nan], None) == [first]


def test_numbers_are_explained() -> None:
    everything = sweep(2)
    legend = make_figure(everything, cheapest(everything, 0.01), "a model").axes[-1].get_legend()
    texts = [each.get_text() for each in legend.get_texts()]
    assert texts[: len(MAIN)] == [*(setting.name for setting in MAIN[1:]), "recommended"]
    assert texts[len(MAIN) :][:2] == ["1: 16, 1, 4, [0], 1", "2: 16, 2, 4, [0], 1"]
    assert len(texts) == len(MAIN) + 20
    assert legend.get_title().get_text().split() == [
        *("numbers:", "chunk,", "top_k,", "summary_cluster,", "exact_layers,", "exact_heads")
    ]


@pytest.mark.parametrize(("unbeaten_every", "numbers"), [(2, 20), (1, 40)])
def test_forty_points_can_be_read(unbeaten_every: int, numbers: int) -> None:
    figure = make_figure(sweep(unbeaten_every), None, "a model")
    cost = figure.axes[-1]
    notes = [child for child in cost.get_children() if isinstance(child, Annotation)]
    assert [note.get_text() for note in notes] == [str(number) for number in range(1, numbers + 1)]
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)
    boxes = [Text.get_window_extent(note, renderer) for note in notes]
    boxes.append(cost.get_legend().get_window_extent(renderer))
    assert not any(one.overlaps(other) for one, other in combinations(boxes, 2))
    assert all(figure.bbox.containsx(box.x1) and figure.bbox.containsy(box.y0) for box in boxes)


def test_without_a_sweep() -> None:
    figure = make_figure([found(setting, 1.0, 0.1) for setting in MAIN], None, "a model")
    assert len(figure.axes[-1].get_legend().get_texts()) == len(MAIN) - 1


def test_a_png() -> None:
    assert imread(io.BytesIO(draw(sweep(2), None, "a model"))).shape == (1235, 1690, 4)
