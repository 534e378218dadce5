"""The last and the best checkpoint: by step and metric, the first that is whole."""

import os
from pathlib import Path

import pytest

from muse_lightning.checkpoints.choice import best_checkpoint, last_checkpoint, step_of, stored
from muse_lightning.checkpoints.manifest import manifest_path
from tests.checkpoints.folder import damage, put


def test_the_last_is_of_the_highest_step_whatever_was_written_last(tmp_path: Path) -> None:
    for step in (9, 10, 100, 8):
        put(tmp_path, step)
    os.utime(tmp_path / "step=8.ckpt", ns=(2**62, 2**62))
    assert last_checkpoint(tmp_path) == tmp_path / "step=100.ckpt"
    assert [step for step, _ in stored(tmp_path)] == [100, 10, 9, 8]


def test_damaged_ones_are_named_and_passed_over(tmp_path: Path) -> None:
    put(tmp_path, 1)
    damage(put(tmp_path, 2))
    manifest_path(put(tmp_path, 3)).unlink()
    put(tmp_path, 4).unlink()
    put(tmp_path, 5).write_bytes(b"")
    lines: list[str] = []
    assert last_checkpoint(tmp_path, lines.append) == tmp_path / "step=1.ckpt"
    assert lines == [
        f"checkpoint {tmp_path}/step=5.ckpt is not used: it has 0 bytes, its manifest says 20",
        f"checkpoint {tmp_path}/step=4.ckpt is not used: No such file or directory",
        f"checkpoint {tmp_path}/step=3.ckpt is not used: it has no manifest, so it was not saved to its end",
        f"checkpoint {tmp_path}/step=2.ckpt is not used: its content has changed since it was saved: SHA-256 differs",
    ]


def test_what_a_killed_save_leaves_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / ".step=3.ckpt.partial-1234abcd").write_bytes(b"part")
    (tmp_path / ".step=3.manifest.json.partial-1234abcd").write_bytes(b"part")
    assert stored(tmp_path) == []
    assert last_checkpoint(tmp_path) is None
    assert last_checkpoint(tmp_path / "nowhere") is None


def test_the_best(tmp_path: Path) -> None:
    for step, loss in ((1, 3.0), (2, 2.0), (3, 2.5), (4, float("nan")), (5, None), (6, 2.0)):
        put(tmp_path, step, loss)
    assert best_checkpoint(tmp_path) == tmp_path / "step=6.ckpt"
    damage(tmp_path / "step=6.ckpt")
    lines: list[str] = []
    assert best_checkpoint(tmp_path, lines.append) == tmp_path / "step=2.ckpt"
    assert len(lines) == 1
    for step in (1, 2, 3):
        manifest_path(tmp_path / f"step={step}.ckpt").unlink()
    assert best_checkpoint(tmp_path, lines.append) is None


@pytest.mark.parametrize(("name", "step"), [("step=7.ckpt", 7), ("epoch=0-step=12.ckpt", 12), ("mine.ckpt", -1)])
def test_the_step_of_one_without_manifest(tmp_path: Path, name: str, step: int) -> None:
    assert step_of(tmp_path / name) == step
    put(tmp_path, 30).rename(tmp_path / name)
    manifest_path(tmp_path / "step=30.ckpt").rename(manifest_path(tmp_path / name))
    assert step_of(tmp_path / name) == 30
