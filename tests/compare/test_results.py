"""Which setting is recommended, and the overlay that says so."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from muse_lightning.compare.losses import Losses
from muse_lightning.compare.report import advice
from muse_lightning.compare.results import Found, cheapest, overlay, to_json
from muse_lightning.compare.settings import Grid, make_settings
from tests.compare.conftest import KV_HEADS, LAYERS, MUSE

DENSE, MUSE_SETTING, BLOCKS, WINDOW, *SWEPT = make_settings(
    MUSE, 12, None, Grid(chunk=(16,), query_cluster=(8,), key_cluster=(4,), top_k=(2, 3, 4)), LAYERS, KV_HEADS
)


def found(setting: object, rise: float, error: float | None, pairs: float, ms: float | None = None) -> Found:
    return Found(setting, Losses([1.0], [1], [1], [], []), (rise, error), pairs, attention_ms=ms)


FOUND = [
    found(DENSE, 0.0, 0.0, 1.0),
    found(MUSE_SETTING, 0.02, 0.001, 0.1),
    found(BLOCKS, 0.001, 0.0001, 0.05),  # cheap and good, but not MuSe
    found(SWEPT[0], 0.009, 0.001, 0.2),  # under the limit only without its standard error
    found(SWEPT[1], 0.007, 0.001, 0.3),
    found(SWEPT[2], 0.001, 0.001, 0.4),
]


@pytest.mark.parametrize(("limit", "chosen"), [(0.01, 4), (0.0111, 3), (0.005, 5), (0.0029, None), (1.0, 1)])
def test_the_cheapest_under_the_limit(limit: float, chosen: int | None) -> None:
    assert cheapest(FOUND, limit) is (None if chosen is None else FOUND[chosen])


def test_exact_attention_is_no_setting_of_muse() -> None:
    exact = found(MUSE_SETTING, 0.0, 0.0, 1.0)
    assert cheapest([exact], 0.01) is None
    (said,) = advice([FOUND[0], exact], None, 0.01, Path("x"), is_sweep=True)
    assert said.startswith("Every MuSe setting attended these blocks exactly")
    said, last = advice([*FOUND[:2], found(SWEPT[0], 0.0, 0.0, 1.0)], None, 0.01, Path("x"), is_sweep=True)
    assert said.startswith("Those MuSe settings with 100.0% of pairs attended")
    assert "the least is 0.0220, of Muse" in last


def test_one_block_has_no_standard_error() -> None:
    only = [found(DENSE, 0.0, None, 1.0), found(MUSE_SETTING, 0.001, None, 0.1)]
    (said,) = advice(only, only[1], 0.01, Path("found/recommended.yaml"), is_sweep=True)
    assert "from one block, so without a standard error: Muse (+0.0010)" in said
    assert said.endswith("--config found/recommended.yaml")


def test_what_is_not_finite_is_null_in_json() -> None:
    each = replace(FOUND[1], gradient_cosine=math.nan, errors=[[0.1, math.nan]])
    content = json.loads(to_json({"seq_len": 1}, [FOUND[0], each], None), parse_constant=pytest.fail)
    assert content["settings"][1]["gradient_cosine"] is None
    assert content["settings"][1]["relative_squared_error_by_layer_and_head"] == [[0.1, None]]


def test_measured_time_decides_where_there_is_one() -> None:
    slow, fast = found(SWEPT[0], 0.001, None, 0.2, ms=3.0), found(SWEPT[1], 0.001, None, 0.3, ms=2.0)
    assert cheapest([slow, fast], 0.01) is fast


def test_the_overlay_is_the_setting() -> None:
    text = overlay(FOUND[4], {"command": "muse compare --sweep=true", "seq_len": 96})
    assert yaml.safe_load(text) == {
        "model": {
            "attention": {"class_path": "Muse", "init_args": SWEPT[1].muse},
            "exact_layers": [],
            "exact_heads": 0,
        }
    }
    assert "+0.0070 (standard error 0.0010)" in text


def test_an_overlay_with_exact_layers() -> None:
    grid = Grid(chunk=(16,), query_cluster=(8,), key_cluster=(4,), top_k=(MUSE.top_k,), exact_layers=((), (-1,)))
    chosen = found(make_settings(MUSE, 12, None, grid, LAYERS, KV_HEADS)[-1], 0.0, None, 0.5)
    text = overlay(chosen, {"command": "muse compare --sweep=true", "seq_len": 96})
    assert yaml.safe_load(text)["model"]["exact_layers"] == [-1] == chosen.record()["exact_layers"]


def test_an_overlay_with_exact_heads() -> None:
    grid = Grid(
        chunk=(16,), query_cluster=(8,), key_cluster=(4,), top_k=(2,), exact_layers=((), (-1,)), exact_heads=(0, 1)
    )
    setting = make_settings(MUSE, 12, None, grid, 3, KV_HEADS)[-1]
    chosen = found(replace(setting, heads={0: (), 1: (1,)}), 0.0, None, 0.5)
    model = yaml.safe_load(overlay(chosen, {"command": "muse compare --sweep=true", "seq_len": 96}))["model"]
    assert (model["exact_layers"], model["exact_heads"]) == ([-1], 1)  # which one, the training chooses
    assert chosen.record()["exact_heads"] == 1
    assert chosen.record()["exact_heads_by_layer"] == {"1": [1]}
