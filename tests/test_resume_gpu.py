"""On a GPU in deterministic mode a resumed run is, bit for bit, the run that saved and went on."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.recipe import Muse
from tests.resumed import check_equal_to_uninterrupted

pytestmark = pytest.mark.gpu

# Sizes that the Triton kernels take, and three batches in an epoch, at whose end a checkpoint is saved, too.
FLAGS = (
    "--trainer.accelerator=gpu",
    "--trainer.deterministic=true",
    "--trainer.precision=bf16-mixed",
    "--model.config.hidden_size=64",
    "--model.config.max_position_embeddings=256",
    "--model.attention.chunk=64",
    "--model.attention.query_cluster=16",
    "--model.attention.key_cluster=16",
    "--model.attention.exact_below=64",
    "--model.attention.implementation=triton",
    "--data.seq_len=256",
    "--data.batch_size=2",
)


@pytest.fixture
def muse(
    tmp_path: Path, tiny_dataset: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Muse]:
    monkeypatch.chdir(tmp_path)
    # As the trainer sets it; here, to be taken back.
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    shutil.copytree(tiny_dataset, "dataset")
    yield Muse(tmp_path, capsys)
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("compiled", ["false", "true"], ids=["eager", "compiled"])
def test_three_stops(muse: Muse, compiled: str) -> None:
    check_equal_to_uninterrupted(muse, *FLAGS, f"--model.compiled={compiled}")
