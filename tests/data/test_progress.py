"""Plain lines where there is no terminal, a bar where there is one."""

import re

import pytest

from muse_lightning.data import progress
from muse_lightning.data.progress import StageProgress


@pytest.fixture
def clock(monkeypatch):
    time = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: time[0])
    return time


def test_plain_lines_at_intervals(capsys, clock):
    with StageProgress("encoding", total_bytes=100) as shown:
        for second in range(1, 26):
            clock[0] = float(second)
            shown.add(4, 1, 2_000_000)
            shown.show()
    assert capsys.readouterr().err.splitlines() == [
        "data: encoding: 40 %, 10 files (1/s), 20.0M tokens (2.00M/s), 0:00:15 left",
        "data: encoding: 80 %, 20 files (1/s), 40.0M tokens (2.00M/s), 0:00:05 left",
    ]


def test_bytes_as_long_as_there_are_no_tokens(clock):
    shown = StageProgress("reading", total_bytes=10_000_000)
    clock[0] = 2.0
    assert shown.rates() == "0 files (0/s), 0.0M B (0.00M/s)"
    shown.add(2_000_000, 6, 0)
    assert shown.rates() == "6 files (3/s), 2.0M B (1.00M/s), 0:00:08 left"
    assert shown.rates(is_done=True) == "6 files (3/s), 2.0M B (1.00M/s)"


def test_work_of_other_processes_and_of_an_earlier_call(clock, capsys):
    shown = StageProgress("encoding", total_bytes=100)
    shown.follow([20, 2, 10_000_000, 0])
    shown.was_done(50)
    shown.add(10, 1, 0)
    clock[0] = 10.0
    assert shown.totals() == (30, 3, 10_000_000)
    shown.show()
    # 80 of 100 bytes are done, 30 of them in 10 seconds.
    assert capsys.readouterr().err == "data: encoding: 80 %, 3 files (0/s), 10.0M tokens (1.00M/s), 0:00:07 left\n"


@pytest.mark.parametrize("no_color", [True, False])
def test_a_bar_on_a_terminal(capsys, monkeypatch, no_color):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")
    if no_color:
        monkeypatch.setenv("NO_COLOR", "1")
    with StageProgress("reading", total_bytes=100) as shown:
        shown.add(50, 3, 10)
        shown.show()
        shown._bar.refresh()
    text = capsys.readouterr().err
    assert "reading" in text
    assert "50 %" in text
    assert "3 files" in text
    assert "left" in text
    assert bool(re.search(r"\x1b\[[0-9;]*38;", text)) != no_color
