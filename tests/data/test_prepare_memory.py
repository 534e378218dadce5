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
    preparation = how(num_workers=2, chunk_bytes=1 << 20)
    card = prepare_dataset(Path(sys.argv[2]), [source], ByteTokenizer(), "bytes", preparation)
    peaks = [resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    print(json.dumps({"files": card.files, "peaks_kib": peaks}))
"""
# Of the whole process. Its Python, libraries and buffers take about 500 MiB.
MOST_GROWTH = 1.1


@pytest.mark.slow
@pytest.mark.multi_process
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
    for small, large in zip(found[100]["peaks_kib"], found[1000]["peaks_kib"], strict=True):
        assert large < MOST_GROWTH * small, found
