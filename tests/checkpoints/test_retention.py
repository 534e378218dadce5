"""What is kept: never fewer than two that are known to be whole, whatever else is there."""

import errno
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from muse_lightning.checkpoints.choice import last_checkpoint
from muse_lightning.checkpoints.manifest import problem_of
from muse_lightning.checkpoints.retention import Retention, remove_partial
from tests.checkpoints.folder import damage, put, steps


def save(retention: Retention, folder: Path, step: int, loss: float | None = None) -> None:
    put(folder, step, loss)
    retention.add(step)
    retention.apply(folder)


@pytest.mark.parametrize("keep_last", [2, 3])
def test_the_last_few_stay(tmp_path: Path, keep_last: int) -> None:
    retention = Retention(keep_last, keep_best=True)
    for step in range(1, 12):
        save(retention, tmp_path, step)
        assert steps(tmp_path) == list(range(max(1, step - keep_last + 1), step + 1))


@pytest.mark.parametrize(("keep_best", "kept"), [(True, [2, 5, 6]), (False, [5, 6])])
def test_the_best_stays(tmp_path: Path, keep_best: bool, kept: list[int]) -> None:
    retention = Retention(2, keep_best)
    for step, loss in ((1, 3.0), (2, 1.0), (3, 2.0), (4, 4.0), (5, 5.0), (6, None)):
        save(retention, tmp_path, step, loss)
    assert steps(tmp_path) == kept


def test_what_was_resumed_from_stays_until_two_newer_are_there(tmp_path: Path) -> None:
    for step in (10, 20, 30, 40):
        put(tmp_path, step)
    damage(tmp_path / "step=30.ckpt")
    damage(tmp_path / "step=40.ckpt")
    retention = Retention(2, keep_best=False, resumed=20)
    save(retention, tmp_path, 25)
    # The damaged ones, though newest, count for nothing.
    assert {20, 25} <= set(steps(tmp_path))
    save(retention, tmp_path, 30)
    assert steps(tmp_path) == [25, 30]
    assert last_checkpoint(tmp_path) == tmp_path / "step=30.ckpt"


def test_a_damaged_one_takes_no_best_ones_place(tmp_path: Path) -> None:
    for step, loss in ((10, 3.0), (20, 2.0), (30, 1.0)):
        put(tmp_path, step, loss)
    damage(tmp_path / "step=30.ckpt")
    retention = Retention(2, keep_best=True, resumed=20)
    for step in (40, 50, 60):
        save(retention, tmp_path, step, loss=4.0)
    assert steps(tmp_path) == [20, 50, 60]


def test_nothing_is_removed_before_two_are_whole(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        damage(put(tmp_path, step))
    retention = Retention(2, keep_best=False)
    save(retention, tmp_path, 4)
    assert steps(tmp_path) == [1, 2, 3, 4]
    save(retention, tmp_path, 5)
    assert steps(tmp_path) == [4, 5]


@pytest.mark.parametrize("seed", range(20))
def test_there_is_always_a_whole_one_to_go_on_from(tmp_path: Path, seed: int) -> None:
    """Starts, saves, damage to the newest and resumes in any order; and two, once there have been two, if none is
    damaged."""
    generator = random.Random(seed)
    step, retention, has_damage = 0, Retention(2, keep_best=True), False
    for _ in range(60):
        if generator.random() < 0.75:
            step += generator.randint(1, 3)
            save(retention, tmp_path, step, generator.choice([None, generator.random()]))
        else:
            whole = [path for path in tmp_path.glob("*.ckpt") if problem_of(path) is None]
            if len(whole) > 1 and generator.random() < 0.5:
                damage(max(whole, key=lambda path: int(path.stem.removeprefix("step="))))
                has_damage = True
            found = last_checkpoint(tmp_path, say=lambda line: None)
            step = 0 if found is None else int(found.stem.removeprefix("step="))
            retention = Retention(2, keep_best=True, resumed=step if found else None)
        whole = [path for path in tmp_path.glob("*.ckpt") if problem_of(path) is None]
        assert whole or step == 0
        assert has_damage or len(whole) >= min(2, len(list(tmp_path.glob("*.ckpt"))))


def test_other_files_are_left_alone(tmp_path: Path) -> None:
    put(tmp_path, 1)
    names = ("mine.ckpt", "mine.manifest.json", "epoch=0-step=1.ckpt", ".step=9.ckpt.partial-00ff00ff", "notes.txt")
    for name in names:
        (tmp_path / name).write_text("x")
    retention = Retention(2, keep_best=True)
    for step in (2, 3, 4):
        save(retention, tmp_path, step)
    assert all((tmp_path / name).exists() for name in names)
    assert not (tmp_path / "step=2.ckpt").exists()
    remove_partial(tmp_path)
    assert [name for name in names if not (tmp_path / name).exists()] == [".step=9.ckpt.partial-00ff00ff"]


@pytest.mark.parametrize("unreadable", [1, 2, 3])
@pytest.mark.parametrize("name", ["{}.manifest.json", "{}.ckpt"])
def test_what_cannot_be_read_for_once_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unreadable: int, name: str
) -> None:
    retention = Retention(2, keep_best=True)
    for step, loss in ((1, 1.0), (2, 2.0), (3, 3.0)):
        put(tmp_path, step, loss)
        retention.add(step)
    broken = tmp_path / name.format(f"step={unreadable}")
    read_text, stat = Path.read_text, Path.stat

    def failing(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Path, *arguments: Any, **options: Any) -> Any:
            if path == broken:
                raise OSError(errno.EIO, "Input/output error")
            return function(path, *arguments, **options)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", failing(read_text))
        patch.setattr(Path, "stat", failing(stat))
        retention.apply(tmp_path)
    assert steps(tmp_path) == [1, 2, 3]
    save(retention, tmp_path, 4, 4.0)
    assert steps(tmp_path) == [1, 3, 4]


def test_a_folder_that_cannot_be_listed_for_once_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    retention = Retention(2, keep_best=False)
    for step in (1, 2):
        save(retention, tmp_path, step)

    def scandir(path: Path) -> Any:
        raise OSError(errno.EMFILE, "Too many open files")

    put(tmp_path, 3)
    retention.add(3)
    with monkeypatch.context() as patch:
        patch.setattr("muse_lightning.checkpoints.retention.stored", scandir)
        retention.apply(tmp_path)
    assert steps(tmp_path) == [1, 2, 3]
    retention.apply(tmp_path)
    assert steps(tmp_path) == [2, 3]
