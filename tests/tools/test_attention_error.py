"""The table of errors on recorded heads, from its command line."""

import json
from pathlib import Path

import pytest

from tools.attention_error import DEFAULT, SETTINGS, main

HEAD = Path(__file__).parents[1] / "data" / "activations" / "layer1_head3.pt"


def test_the_table_and_the_raw_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([str(HEAD), "--tokens", "2200", "--json", str(tmp_path / "errors.jsonl")])
    records = [json.loads(line) for line in (tmp_path / "errors.jsonl").read_text().splitlines()]
    errors = {record["setting"]: record["relative_squared_error"] for record in records}
    assert len(errors) == len(SETTINGS) + 1
    table = capsys.readouterr().out.splitlines()
    assert table[0] == "| setting | layer1_head3, 2200 tokens |"
    assert len(table) == 2 + len(errors)
    for row, (setting, error) in zip(table[2:], errors.items(), strict=True):
        assert row == f"| {setting} | {error:.3f} |"
    default = errors[DEFAULT]
    plain_means = errors["SpatialBlocks: spatial clusters, plain means"]
    assert 0 < default < plain_means
    assert default < errors["top_k 8"] < errors["top_k 0"]
    assert len({default, errors["summaries of 64 keys"], errors["clusters 64/64"], errors["top_k 16"]}) == 4
