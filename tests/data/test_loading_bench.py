"""`muse bench data`: a line for each number of workers, and a verdict."""

import json

import pytest

from muse_lightning.data import loading_bench
from muse_lightning.data.loading_bench import bench_data
from muse_lightning.errors import UserError


@pytest.mark.parametrize("target", [1, 1e12])
def test_a_prepared_dataset(prepared, tmp_path, capsys, target):
    out = tmp_path / "rates.jsonl"
    bench_data(prepared, seq_len=300, batch_size=2, workers=(0,), seconds=0.2, target=target, out=out)
    (rate,) = map(json.loads, out.read_text().splitlines())
    assert (rate["num_workers"], rate["batch_size"], rate["seq_len"]) == (0, 2, 300)
    assert rate["batches"] > 16
    # What was timed is what was read.
    assert 0.2 <= rate["batches"] * 2 * 300 / rate["tokens_per_sec"] < 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("0 workers: ")
    assert ("reached" if target == 1 else "missed") in lines[1]


def test_tokens_made_for_it(capsys, monkeypatch):
    monkeypatch.setattr(loading_bench, "_MADE_CHUNKS", 1)
    bench_data(seq_len=65_536, workers=(0,), seconds=0.1, target=1)
    assert "target 1e-06M tokens/s: reached" in capsys.readouterr().out


def test_too_long_a_context_is_one_line(prepared):
    with pytest.raises(UserError, match=r"seq_len: 10000000 found; the dataset has 0 blocks of that length"):
        bench_data(prepared, seq_len=10_000_000)
