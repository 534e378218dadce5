"""tools/soak.py: finds a process that leaks, passes one that does not, and measures slopes as NumPy does."""

import json
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
import pytest

from tools import soak

IDLE = "import time; print(flush=True); data = bytearray(40 << 20)\nwhile True: time.sleep(0.02)"
MEMORY = "import time; kept = []\nwhile True: kept.append(b'x' * (1 << 20)); time.sleep(0.01)"
DESCRIPTORS = "import os, time\nwhile True: os.open('/dev/null', os.O_RDONLY); time.sleep(0.01)"
CHECKPOINTS = """
import pathlib, time
folder = pathlib.Path("runs/a/version_0/checkpoints"); folder.mkdir(parents=True)
for step in range(1, 100000): (folder / f"step={step}.ckpt").write_bytes(bytes(20000)); time.sleep(0.01)
"""


def watch(program: str, folder: Path, seconds: float) -> tuple[list[soak.Sample], int | None]:
    return soak.watch([sys.executable, "-c", program], folder, seconds=seconds, every=0.02)


@pytest.mark.parametrize(
    ("program", "growing"),
    [(MEMORY, {"rss_mib", "pss_mib"}), (DESCRIPTORS, {"descriptors"}), (CHECKPOINTS, {"checkpoints_mib"})],
    ids=["memory", "descriptors", "checkpoints"],
)
def test_a_process_that_leaks_is_found(program: str, growing: set[str], tmp_path: Path) -> None:
    samples, exit_code = watch(program, tmp_path, 1.5)
    assert exit_code is None
    lines, found = soak.report(soak.training(samples))
    assert set(found) == growing, lines
    assert [json.loads(line)["pss_mib"] for line in (tmp_path / "samples.jsonl").read_text().splitlines()] == [
        sample.pss_mib for sample in samples
    ]


def test_a_flat_process_passes_and_is_drawn(tmp_path: Path) -> None:
    samples, exit_code = watch(IDLE, tmp_path, 1.5)
    assert exit_code is None
    lines, found = soak.report(samples)
    assert found == [], lines
    assert len(lines) == 6
    assert 40 < samples[-1].rss_mib < 80
    soak.draw(samples, tmp_path / "soak.png")
    assert (tmp_path / "soak.png").read_bytes().startswith(b"\x89PNG")


def test_a_process_that_ends_is_told(tmp_path: Path) -> None:
    assert watch("raise SystemExit(3)", tmp_path, 10)[1] == 3


def test_children_count_and_end(tmp_path: Path) -> None:
    program = f"import os; open('pid', 'w').write(str(os.getpid())); {IDLE}"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {program!r}])"
    samples, _ = watch(parent, tmp_path, 1.5)
    assert samples[-1].processes == 2
    assert samples[-1].pss_mib > samples[-1].rss_mib + 30
    with suppress(psutil.NoSuchProcess):
        psutil.Process(int((tmp_path / "pid").read_text())).wait(5)


def test_the_slope_is_that_of_numpy() -> None:
    rng = np.random.default_rng(0)
    seconds = np.arange(400) * 9.0
    values = 50 + 3 * seconds / 3600 + rng.normal(size=400)
    found = soak.trend(seconds.tolist(), values.tolist())
    kept = slice(100, None)
    blocks = [x[kept].reshape(soak.BLOCKS, -1).mean(1) for x in (seconds / 3600, values)]
    (slope, _), covariance = np.polyfit(*blocks, 1, cov=True)
    assert found.per_hour == pytest.approx(slope)
    assert found.error == pytest.approx(covariance[0, 0] ** 0.5)
    assert found.mean == pytest.approx(values[kept].mean())


def test_the_error_is_honest_where_neighbours_are_alike() -> None:
    """Flat series of correlated noise rarely have a slope of three standard errors: 5 %; without blocks, a quarter."""
    rng = np.random.default_rng(0)
    seconds = (np.arange(480) * 9.0).tolist()
    noise = rng.normal(size=(200, 480 + 9))
    series = np.stack([noise[:, i : i + 480] for i in range(10)]).mean(0)  # alike over 10 samples
    ratios = [abs(found.per_hour / found.error) for found in (soak.trend(seconds, x.tolist()) for x in series)]
    assert np.mean(np.array(ratios) > soak.ERRORS) < 0.1


def test_too_few_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="20 samples, 15 after the warm-up; at least 24 are needed"):
        soak.trend(list(range(20)), [1.0] * 20)


def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match="has files in it"):
        soak.main([str(tmp_path)])
