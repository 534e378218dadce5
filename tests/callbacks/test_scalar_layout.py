"""The charts of TensorBoard's page "Custom Scalars": TensorBoard's own plugin reads them, and finds every tag once."""

import json
import re
from pathlib import Path

import pytest
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins.base_plugin import TBContext, TBPlugin
from tensorboard.plugins.custom_scalar.custom_scalars_plugin import CustomScalarsPlugin
from tensorboard.plugins.scalar.scalars_plugin import ScalarsPlugin

from muse_lightning.callbacks import ContextGain, ContextWarmup, FutureGain
from muse_lightning.callbacks.scalar_layout import CHARTS, ScalarLayout
from tests.tiny import TinyData, batches, tiny_model, tiny_muse, tiny_trainer

DOCS = Path(__file__).parents[2] / "docs"
FIGURES = {"val/loss_by_position", "val/needle_accuracy", "val/identifier_recall"}
ELSEWHERE = {"baseline/unigram_bpb", "baseline/bigram_bpb"}
"""Tags of a callback that a recipe names."""


def documented_tags() -> set[str]:
    """The first columns of the tables of tags, {a,b} written out, and 0 for `*`."""
    tags = set()
    for page in ("training.md", "evaluation.md"):
        for cell in re.findall(r"^\| `((?:[a-z]+/|lr-)[^`]*)`", (DOCS / page).read_text(), flags=re.MULTILINE):
            before, _, rest = cell.partition("{")
            names, _, after = rest.partition("}")
            tags |= {(before + name + after).replace("*", "0") for name in names.split(",")}
    return tags - FIGURES


class Page:
    """What TensorBoard's server says of a folder of runs."""

    def __init__(self, root: Path) -> None:
        events = EventMultiplexer().AddRunsFromDirectory(str(root)).Reload()
        plugins: dict[str, TBPlugin] = {}
        context = TBContext(
            data_provider=MultiplexerDataProvider(events, str(root)), plugin_name_to_instance=plugins, logdir=str(root)
        )
        plugins["scalars"] = ScalarsPlugin(context)
        self._plugin = CustomScalarsPlugin(context)
        self.runs = list(events.Runs())

    def charts(self) -> dict[str, dict[str, list[str]]]:
        """Category -> chart -> patterns."""
        layout = json.loads(self._plugin.layout_impl(RequestContext(), ""))
        return {
            category["title"]: {chart["title"]: chart["multiline"]["tag"] for chart in category["chart"]}
            for category in layout["category"]
        }

    def drawn(self, pattern: str) -> set[str]:
        """The tags that a chart with this pattern has a curve of."""
        (run,) = self.runs
        found = self._plugin.scalars_impl(RequestContext(), run, pattern, "")
        assert found["regex_valid"]
        return set(found["tag_to_events"])


@pytest.fixture
def written(tmp_path: Path) -> Page:
    """A fit's layout, beside a value of every tag."""
    callbacks = [ScalarLayout(), ContextGain(), FutureGain(), ContextWarmup(1, 8)]
    trainer = tiny_trainer(tmp_path, max_steps=1, callbacks=callbacks)
    trainer.fit(tiny_model(attention=tiny_muse, exact_heads=1), TinyData(batches(1)))
    for tag in documented_tags() | ELSEWHERE:
        trainer.logger.log_metrics({tag: 1.0}, step=1)
    trainer.logger.finalize("success")
    return Page(tmp_path)


def test_every_tag_is_drawn_once(written: Page) -> None:
    drawn = [
        tag
        for charts in written.charts().values()
        for patterns in charts.values()
        for pattern in patterns
        for tag in written.drawn(pattern)
    ]
    # A processor's peak is not known.
    wanted = {tag for tag in documented_tags() | ELSEWHERE if "/mfu" not in tag}
    assert len(wanted) > 35
    assert sorted(drawn) == sorted(wanted)


def test_no_chart_is_empty(written: Page) -> None:
    for charts in written.charts().values():
        for title, patterns in charts.items():
            for pattern in patterns:
                assert written.drawn(pattern), title


def test_all_charts_but_those_of_a_gpu(written: Page) -> None:
    wanted = {category: list(charts) for category, charts in CHARTS.items()}
    wanted["speed"].remove("model FLOPs utilisation")
    assert {category: list(charts) for category, charts in written.charts().items()} == wanted


@pytest.mark.parametrize("exact_heads", [0, 1])
def test_a_fit_without_the_callbacks_of_far_context(tmp_path: Path, exact_heads: int) -> None:
    """Nor heads among others that are not exact: with exact attention there are none, whatever the recipe says."""
    trainer = tiny_trainer(tmp_path, max_steps=1, callbacks=[ScalarLayout()])
    trainer.fit(tiny_model(exact_heads=exact_heads), TinyData(batches(1)))
    charts = Page(tmp_path).charts()
    assert list(charts) == ["loss", "optimizer", "speed", "attention"]
    assert list(charts["attention"]) == ["relative squared error"]


def test_a_validation_alone_after_a_fit(tmp_path: Path) -> None:
    """Layouts of several runs are one page: charts of the same name are there once."""
    for fits, callbacks in ((True, []), (False, [ContextGain()])):
        trainer = tiny_trainer(
            tmp_path, max_steps=1, logger=TensorBoardLogger(tmp_path), callbacks=[ScalarLayout(), *callbacks]
        )
        data = TinyData(batches(1), batches(1))
        trainer.fit(tiny_model(), data) if fits else trainer.validate(tiny_model(), data, verbose=False)
    page = Page(tmp_path)
    assert len(page.runs) == 2
    assert set(page.charts()) == set(CHARTS)
    assert list(page.charts()["loss"]) == list(CHARTS["loss"])


def test_once_for_each_start(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, max_steps=4, val_check_interval=1, callbacks=[ScalarLayout()])
    trainer.fit(tiny_model(), TinyData(batches(4), batches(1)))
    (file,) = Path(trainer.logger.log_dir).glob("events.*")
    assert file.read_bytes().count(b"custom_scalars__config__") == 1
