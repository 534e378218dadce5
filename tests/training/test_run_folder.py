"""Run folders: one owner each, whoever starts at the same time, and nothing half-made."""

import errno
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.utilities import rank_zero_only

from muse_lightning.errors import StorageError, UserError
from muse_lightning.training.run_folder import (
    CHECKPOINT_VARIABLE,
    RUN_FOLDER_VARIABLE,
    RunFolder,
    find_checkpoint,
    versions_with_checkpoints,
)
from tests.checkpoints.folder import damage, put


@pytest.fixture(autouse=True)
def _no_inherited_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(CHECKPOINT_VARIABLE, raising=False)
    monkeypatch.delenv(RUN_FOLDER_VARIABLE, raising=False)
    monkeypatch.setattr(rank_zero_only, "rank", 0, raising=False)


def test_each_run_gets_the_next_version(tmp_path: Path) -> None:
    (tmp_path / "demo" / "version_7").mkdir(parents=True)
    (tmp_path / "demo" / "version_old").mkdir()
    with RunFolder.create(tmp_path, "demo") as first, RunFolder.create(tmp_path, "demo") as second:
        assert first.path == tmp_path / "demo" / "version_8"
        assert second.path == tmp_path / "demo" / "version_9"


def test_runs_that_start_together_get_different_folders(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(lambda _: RunFolder.create(tmp_path, "demo"), range(24)))
    assert sorted(folder.path.name for folder in folders) == sorted(f"version_{n}" for n in range(24))
    for folder in folders:
        folder.__exit__()


def test_a_root_that_cannot_be_looked_into_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, **options: Any) -> bool:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "exists", refuse)
    with pytest.raises(StorageError, match=r"run.root: cannot create a folder in .*/closed/name: Permission denied"):
        RunFolder.create(tmp_path / "closed", "name")


def test_a_folder_in_use_is_refused_with_its_user(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from muse_lightning.training.run_folder import RunFolder\n"
        f"with RunFolder.create(Path({str(tmp_path)!r}), 'demo', 3): print('ready', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdin is not None
        assert other.stdout.readline() == "ready\n"
        with pytest.raises(UserError, match=rf"run.version: .*version_3 is in use by process {other.pid} on "):
            RunFolder.create(tmp_path, "demo", 3)
        other.stdin.close()
        other.wait()
    with pytest.raises(UserError, match=r"version_3 exists already; leave run.version out"):
        RunFolder.create(tmp_path, "demo", 3)


def test_other_ranks_learn_the_folder_and_write_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with RunFolder.create(tmp_path, "demo") as owner:
        monkeypatch.setattr(rank_zero_only, "rank", 1)
        with RunFolder.create(tmp_path, "demo") as other:
            assert other.path == owner.path
            assert owner.is_owner
            assert not other.is_owner
            other.write("config.yaml", "x: 1\n")
            other.discard()
    assert [path.name for path in owner.path.iterdir()] == ["lock"]


@pytest.mark.parametrize("has_checkpoint", [False, True])
def test_the_first_process_of_another_node_owns_nothing_and_tells_its_own_ranks(
    has_checkpoint: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if has_checkpoint:
        folder = tmp_path / "demo" / "version_0" / "checkpoints"
        folder.mkdir(parents=True)
        put(folder, 3)
    before = sorted(tmp_path.rglob("*"))

    def opened() -> RunFolder:
        return RunFolder.resume(tmp_path, "demo") or RunFolder.create(tmp_path, "demo")

    # Lightning's rank is 0 there until there is a trainer, as in the fixture.
    monkeypatch.setenv("NODE_RANK", "1")
    with opened() as first:
        assert not first.is_owner
        assert not first.is_inherited, "its exit code is that of the node"
        monkeypatch.setattr(rank_zero_only, "rank", 3)
        with opened() as second:
            assert second.is_inherited, "Lightning would kill the node if it ended with 75"
            assert second.path == first.path.resolve()
            assert second.resumed == (first.resumed and first.resumed.resolve())
        assert RUN_FOLDER_VARIABLE in os.environ
    assert not {RUN_FOLDER_VARIABLE, CHECKPOINT_VARIABLE} & set(os.environ)
    assert sorted(tmp_path.rglob("*")) == before


def test_written_files_are_whole(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path, "demo") as folder:
        folder.write("config.yaml", "a: 1\n")
        folder.write_environment({"python": "3.11"})
        assert (folder.path / "config.yaml").read_text() == "a: 1\n"
        assert json.loads((folder.path / "environment.json").read_text()) == {"python": "3.11"}


def test_storage_that_cannot_rename_is_copied_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*paths: Path) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(os, "replace", refuse)
    with RunFolder.create(tmp_path, "demo") as folder:
        folder.write("config.yaml", "a: 1\n")
        assert {path.name for path in folder.path.iterdir()} == {"lock", "config.yaml"}
        assert (folder.path / "config.yaml").read_text() == "a: 1\n"


def test_a_write_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise OSError(28, "No space left on device")

    with RunFolder.create(tmp_path, "demo") as folder:
        monkeypatch.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="No space"):
            folder.write("config.yaml", "a: 1\n")
        assert [path.name for path in folder.path.iterdir()] == ["lock"]


def test_discarding_removes_only_what_the_run_made(tmp_path: Path) -> None:
    root = tmp_path / "runs"
    with RunFolder.create(root, "demo") as first:
        with RunFolder.create(root, "demo") as second:
            second.discard()
        assert first.path.is_dir()
        assert not second.path.exists()
        first.discard()
    assert not root.exists()


def test_discarding_keeps_a_root_that_was_there(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path, "demo") as folder:
        folder.discard()
    assert tmp_path.is_dir()
    assert not list(tmp_path.iterdir())


def test_a_root_that_cannot_be_made_is_the_users_mistake(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"run\.root: cannot create a folder in .*file/demo: "):
        RunFolder.create(tmp_path / "file", "demo")


@pytest.mark.parametrize(
    ("environment", "found"),
    [
        ('{"reproduces": "/runs/demo/version_0"}', [0]),
        ('{"reproduces": null}', [1, 0]),
        ("[]", [1, 0]),
        ("{", [1, 0]),
        (None, [1, 0]),
    ],
    ids=["reproduction", "run", "other", "damaged", "absent"],
)
def test_a_reproduction_is_gone_on_with_only_by_its_number(
    tmp_path: Path, environment: str | None, found: list[int]
) -> None:
    versions = [tmp_path / "demo" / f"version_{number}" for number in range(2)]
    for version in versions:
        version.mkdir(parents=True)
        put(version / "checkpoints", 4)
    if environment is not None:
        (versions[1] / "environment.json").write_text(environment)
    assert list(versions_with_checkpoints(tmp_path, "demo")) == [versions[number] for number in found]
    assert list(versions_with_checkpoints(tmp_path, "demo", 1)) == [versions[1]]


def test_the_best_where_nothing_was_measured(tmp_path: Path) -> None:
    """The newest checkpoint that is there is named; one that was measured but is damaged is another mistake."""
    folders = [tmp_path / "demo" / f"version_{number}" / "checkpoints" for number in range(2)]
    for step, folder in zip((8, 4), folders, strict=True):
        folder.parent.mkdir(parents=True)
        put(folder, step)
    put(folders[1], 5).unlink()
    newest = folders[1] / "step=4.ckpt"
    with pytest.raises(UserError, match=rf"no checkpoint in {tmp_path}/demo has one noted.*, such as {newest}$"):
        find_checkpoint(tmp_path, "demo", "best")
    assert find_checkpoint(tmp_path, "demo", "last") == newest
    damage(put(folders[0], 9, 2.0))
    with pytest.raises(UserError, match=r"best found, but no run in .* that is whole, measured by a validation$"):
        find_checkpoint(tmp_path, "demo", "best")


def test_the_last_where_none_is_whole(tmp_path: Path) -> None:
    (tmp_path / "demo" / "version_0").mkdir(parents=True)
    damage(put(tmp_path / "demo" / "version_0" / "checkpoints", 4))
    with pytest.raises(UserError, match=rf"^ckpt_path: last found, but no run in {tmp_path}/demo has a .* is whole$"):
        find_checkpoint(tmp_path, "demo", "last")
