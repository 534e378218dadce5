"""Plain lines where there is no terminal, a bar where there is one."""

import re

import pytest

from muse_lightning.data import progress
from muse_lightning.data.progress import PreparationProgress


def test_plain_lines_at_intervals(capsys, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    with PreparationProgress(total_bytes=100) as shown:
        for second in range(1, 26):
            clock[0] = float(second)
            shown.advance(listed_bytes=4, files=1, tokens=2_000_000)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "data: 40 % prepared, 10 files (1/s), 20.0M tokens (2.00M/s)",
        "data: 80 % prepared, 20 files (1/s), 40.0M tokens (2.00M/s)",
    ]


@pytest.mark.parametrize("no_color", [True, False])
def test_a_bar_on_a_terminal(capsys, monkeypatch, no_color):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")
    if no_color:
        monkeypatch.setenv("NO_COLOR", "1")
    with PreparationProgress(total_bytes=100) as shown:
        shown.advance(listed_bytes=50, files=3, tokens=10)
        shown._bar.refresh()
    text = capsys.readouterr().err
    assert "50 %" in text
    assert "3 files" in text
    assert bool(re.search(r"\x1b\[[0-9;]*38;", text)) != no_color
