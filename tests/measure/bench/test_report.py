"""Records, tables and figure of measurements that were made up."""

import json

from muse_lightning.measure.bench.figure import COLORS, draw
from muse_lightning.measure.bench.report import (
    aligned,
    error_table,
    markdown,
    parts_table,
    results_page,
    timing_table,
)
from muse_lightning.measure.bench.variants import LABELS
from tests.measure.bench.fabricated import results


def test_json_lines() -> None:
    records = [json.loads(line) for line in results().json_lines().splitlines()]
    assert records[0]["record"] == "header"
    assert records[0]["packages"]["torch"] == "2.13.0"
    kinds = [record["record"] for record in records]
    assert {kind: kinds.count(kind) for kind in kinds} == {"header": 1, "check": 1, "timing": 14, "part": 2, "error": 1}
    (muse,) = (
        record
        for record in records
        if record["record"] == "timing"
        and (record["variant"], record["num_tokens"], record.get("pass")) == ("muse", 65536, "forward_backward")
    )
    assert muse["median_ms"] == 12.0
    assert muse["runs"] == 9
    assert muse["times_faster_than_cudnn"] == 8.0
    assert muse["times_faster_than_flash"] == 16.0
    assert muse["peak_mib"] == 1234.5
    assert {"variant": "nsa", "num_tokens": 65536, "not_timed": "not installed", "record": "timing"} in records


def test_timing_table() -> None:
    table = timing_table(results(), 65536)
    assert [row[1] for row in table] == ["variant", "MuSe", "cuDNN", "FlashAttention", "NSA (fla)"]
    muse = dict(zip(table[0][-6:], table[1][-6:], strict=True))
    assert muse == {
        "fwd+bwd ms": "12.0",
        "min-p90": "11.9-12.2",
        "x cuDNN": "8.00",
        "x Flash": "16.00",
        "of peak": "50%",
        "peak MiB": "1,234",
    }
    assert table[4] == ["65,536", "NSA (fla)", "not installed"]
    assert len(timing_table(results())) == 9


def test_text_is_aligned() -> None:
    lines = aligned(
        [["N", "name", "ms"], ["16,384", "a", "1.5"], ["8", "long name", "10.25"], ["8", "b", "no"]]
    ).splitlines()
    assert lines == [
        "     N  name          ms",
        "16,384  a            1.5",
        "     8  long name  10.25",
        "     8  b             no",
    ]
    short = aligned([["N", "name", "ms"], ["8", "a", "1.5"], ["8", "b, not timed at all"]]).splitlines()
    assert short == ["N  name   ms", "8  a     1.5", "8  b, not timed at all"]


def test_markdown_tables_are_rectangular() -> None:
    lines = markdown(timing_table(results())).splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert lines[1] == "|" + " --- |" * 12


def test_parts_and_errors() -> None:
    (part,) = results().parts.values()
    assert parts_table(part)[1] == ["far", "3.000", "25%", "-", "-", "-", "-"]
    assert error_table(results().errors)[1] == ["layer1_head3", "16,384", "16", "0.0550", "0.900", "0.910", "0.970"]


def test_the_page_states_what_a_result_must() -> None:
    page = results_page(results())
    for text in (
        "**Answer.** Times as fast as cuDNN, forward and backward: 2.00 at 16,384, 8.00 at 65,536 tokens.",
        "Imaginary GPU, 80 GiB, sm_90, driver 1.2, CUDA 13.0, torch 2.13.0, triton 3.7.1, Python 3.11.1",
        "Commit abc123",
        "    muse bench attention",
        "800 TFLOP/s",
        "passed each of 1 comparisons",
        "not installed",
        "## MuSe by part, 65,536 tokens",
        "layer1_head3",
        "![time and ratio against length](attention.png)",
    ):
        assert text in page, text


def test_the_figure_is_drawn() -> None:
    assert draw(results())[:8] == b"\x89PNG\r\n\x1a\n"
    assert set(COLORS) == set(LABELS)
