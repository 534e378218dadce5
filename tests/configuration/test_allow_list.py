"""Processes that a command starts import nothing from the working directory."""

import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest

from muse_lightning.configuration.allow_list import only_allowed_modules
from muse_lightning.data.documents import DamagedSource
from muse_lightning.data.sources.package_index import pip_settings
from muse_lightning.data.sources.table_rows import open_parquet_rows
from tests.data.sources.builders import LIMITS


@pytest.fixture
def traps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with modules that leave a trace when they run."""
    trace = tmp_path / "trace"
    for module in ("pip", "pyarrow", "fsspec", "selectors", "pickle"):
        (tmp_path / f"{module}.py").write_text(f"open({str(trace)!r}, 'a').write({module!r}); raise ImportError\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    return trace


def test_the_traps_work(traps: Path) -> None:
    subprocess.run([sys.executable, "-c", "import pickle"], check=False, stderr=subprocess.DEVNULL)
    assert traps.read_text() == "pickle"


def test_worker_processes(traps: Path) -> None:
    with only_allowed_modules(()), ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        assert pool.submit(abs, -1).result() == 1
    assert not traps.exists()


def test_the_reader_of_parquet(traps: Path) -> None:
    with pytest.raises(DamagedSource), open_parquet_rows("no-such.parquet", None, LIMITS) as rows:
        list(rows)
    assert not traps.exists()


def test_the_settings_of_pip(traps: Path) -> None:
    pip_settings.cache_clear()
    pip_settings()
    assert not traps.exists()
