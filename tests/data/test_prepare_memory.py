"""Preparation takes no more memory for ten times as many repositories."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MEASURED = """
import json, resource, sys
from pathlib import Path
from muse_lightning.data.sources import Folders
from tests.data.test_prepare_stages import ByteTokenizer, how, prepare_dataset

if __name__ == "__main__":
    source = Folders(Path(sys.argv[1]))
    preparation = how(chunk_bytes=1 << 20)
    card = prepare_dataset(Path(sys.argv[2]), [source], ByteTokenizer(), "bytes", preparation)
    print(json.dumps({"files": card.files, "peak_kib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}))
"""
# Of the one process that does everything. Its Python, libraries and buffers take 300 to 500 MiB.
MOST_GROWTH = 1.1


@pytest.mark.slow
def test_peak_memory_is_flat_in_the_number_of_repositories(tmp_path):
    (tmp_path / "main.py").write_text(MEASURED)
    found = {}
    for count in (100, 1000):
        for number in range(count):
            folder = tmp_path / f"code{count}" / f"repository-{number}"
            folder.mkdir(parents=True)
            for file in range(2):
                (folder / f"{file}.py").write_text(f"value_{number}_{file} = {number}\n" * 200)
        run = subprocess.run(
            [sys.executable, "main.py", f"code{count}", f"set{count}"],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            check=True,
        )
        found[count] = json.loads(run.stdout)
    assert [found[count]["files"] for count in (100, 1000)] == [200, 2000]
    assert found[1000]["peak_kib"] < MOST_GROWTH * found[100]["peak_kib"], found
