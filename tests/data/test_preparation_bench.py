"""`muse bench prepare`: what it times is what it says."""

import os

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from muse_lightning.data.preparation_bench import bench_prepare
from muse_lightning.errors import UserError
from tests.data.memory_source import MemorySource, text


@pytest.fixture
def tokenizer(tmp_path, monkeypatch):
    """A byte-level tokenizer.json; the working directory is where the benchmark may write."""
    monkeypatch.chdir(tmp_path)
    for name in ("RAYON_NUM_THREADS", "TOKENIZERS_PARALLELISM"):
        monkeypatch.setenv(name, "1")
    raw = tokenizers.Tokenizer(models.BPE({c: i for i, c in enumerate(pre_tokenizers.ByteLevel.alphabet())}, []))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.save("tokenizer.json")
    return "tokenizer.json"


def test_both_are_timed_on_the_files_that_are_left(tokenizer, capsys, tmp_path):
    files = {"a.py": text(1, 3000), "b.py": text(2, 2000), "copy.py": text(1, 3000), "binary": b"\0"}
    cores = os.sched_getaffinity(0)
    bench_prepare([MemorySource({"r": files})], tokenizer, repeats=2)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("2 files, 0.0 MB; 1 core(s)")
    assert [line.split(":")[0] for line in lines[1:4]] == ["encode_batch", "encode_batch_fast", "prepare"]
    assert len(lines) == 1 + 2 * 4 + 1
    assert lines[-1].startswith("median ")
    assert os.sched_getaffinity(0) == cores
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.json"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"tokenizer": "bytes"}, "tokenizer: bytes found"), ({"workers": 0}, "workers: 0 found, 1 to .* expected")],
)
def test_mistakes(tokenizer, arguments, message):
    with pytest.raises(UserError, match=message):
        bench_prepare([MemorySource({})], **{"tokenizer": tokenizer, **arguments})
