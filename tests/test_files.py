"""Files and folders are whole or absent."""

import errno
import fcntl
import hashlib
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest

from muse_lightning import files
from muse_lightning.errors import UserError


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("content", [b"\x00\xff", "text \u00e9"])
def test_atomic_write_replaces_the_whole_file(tmp_path, content):
    path = tmp_path / "a.json"
    path.write_text("something longer that was there before")
    files.atomic_write(path, content)
    assert path.read_bytes() == (content if isinstance(content, bytes) else content.encode())
    assert names(tmp_path) == ["a.json"]


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_atomic_write_leaves_the_old_file_when_it_fails(tmp_path, monkeypatch, failing):
    path = tmp_path / "a.json"
    path.write_text("old")

    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, failing, fail)
    with pytest.raises(OSError, match="No space"):
        files.atomic_write(path, "new")
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.json"]


def test_atomic_write_syncs_the_content_before_the_rename(tmp_path, monkeypatch):
    calls = []
    real_fsync, real_replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append("fsync"), real_fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append("replace"), real_replace(a, b)))
    files.atomic_write(tmp_path / "a", "x")
    assert calls == ["fsync", "replace", "fsync"]


def test_atomic_directory_appears_at_the_end(tmp_path):
    target = tmp_path / "data"
    with files.atomic_directory(target) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "a").write_text("x")
        assert folder.parent == tmp_path
        assert not target.exists()
    assert (target / "sub" / "a").read_text() == "x"
    assert names(tmp_path) == ["data"]


def test_atomic_directory_replaces_a_folder_and_clears_leftovers(tmp_path):
    target = tmp_path / "data"
    (tmp_path / ".data.partial-0000").mkdir()
    target.mkdir()
    (target / "old").write_text("old")
    with files.atomic_directory(target) as folder:
        (folder / "new").write_text("new")
    assert names(target) == ["new"]
    assert names(tmp_path) == ["data"]


@pytest.mark.parametrize("name", ["a*", "[ab]*", "x*[**"])
def test_leftovers_are_those_of_this_name_alone(tmp_path, name):
    for left in ("ab", name):
        (tmp_path / f".{left}{files.PARTIAL}1").mkdir()
    with files.atomic_directory(tmp_path / name):
        pass
    assert names(tmp_path) == sorted([name, f".ab{files.PARTIAL}1"])


def test_home_folders(monkeypatch):
    monkeypatch.setenv("HOME", "/home/h")
    assert files.expand_home("~/a") == Path("/home/h/a")
    assert files.expand_home(Path("a/~b")) == Path("a/~b")
    with pytest.raises(UserError, match="no user of this name has a home folder"):
        files.expand_home("~no-such-user/a")


def test_atomic_directory_keeps_the_old_folder_when_the_block_fails(tmp_path):
    target = tmp_path / "data"
    target.mkdir()
    (target / "old").write_text("old")

    def build() -> None:
        with files.atomic_directory(target) as folder:
            (folder / "new").write_text("new")
            raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        build()
    assert names(target) == ["old"]
    assert names(tmp_path) == ["data"]


def test_sha256_of_a_file_and_of_its_bytes(tmp_path):
    content = os.urandom(3 << 20)
    (tmp_path / "a").write_bytes(content)
    assert files.sha256_file(tmp_path / "a") == files.sha256_bytes(content) == hashlib.sha256(content).hexdigest()


APPEND_IN_TWO_STEPS = """
import sys
from contextlib import nullcontext
from pathlib import Path
from muse_lightning.files import exclusive_lock

path = Path(sys.argv[1])
with exclusive_lock(path):
    path.write_text(path.read_text() + "[")
    path.write_text(path.read_text() + "]")
"""


@pytest.mark.multi_process
def test_exclusive_lock_lets_one_process_in(tmp_path):
    path = tmp_path / "log"
    path.write_text("")
    with files.exclusive_lock(path):
        processes = [subprocess.Popen([sys.executable, "-c", APPEND_IN_TWO_STEPS, str(path)]) for _ in range(3)]
        with pytest.raises(subprocess.TimeoutExpired):
            processes[0].wait(0.5)
        assert path.read_text() == ""
    assert [process.wait(10) for process in processes] == [0, 0, 0]
    assert path.read_text() == "[][][]"
    assert names(tmp_path) == ["log"]


def test_exclusive_lock_leaves_nothing_of_a_block_that_fails(tmp_path):
    def fail(name: str) -> None:
        with files.exclusive_lock(tmp_path / name):
            raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        fail("new/folder/data")
    assert names(tmp_path) == []
    with files.exclusive_lock(tmp_path / "old" / "data"):
        pass
    for name in ("old/data", "old/new/data"):
        with pytest.raises(RuntimeError, match="no more"):
            fail(name)
    assert names(tmp_path / "old") == []


HOLD = """
import sys
from contextlib import nullcontext
from pathlib import Path
from muse_lightning.files import exclusive_lock

with exclusive_lock(Path(sys.argv[1])):
    print("in", flush=True)
    sys.stdin.read()
"""


@pytest.mark.multi_process
def test_who_waited_for_a_block_that_failed_holds_the_lock(tmp_path):
    path = tmp_path / "new" / "data"

    def fail_while_another_waits() -> None:
        with files.exclusive_lock(path):
            other = subprocess.Popen(
                [sys.executable, "-c", HOLD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            waiting.append(other)
            with pytest.raises(subprocess.TimeoutExpired):
                other.wait(0.5)
            raise RuntimeError("no more")

    waiting: list[subprocess.Popen[str]] = []
    with pytest.raises(RuntimeError, match="no more"):
        fail_while_another_waits()
    with waiting[0] as other:
        assert other.stdout.readline() == "in\n"
        with (path.parent / ".data.lock").open() as lock, pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        other.stdin.close()


def test_exclusive_lock_names_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UserError, match=r"cannot write in .*/file/sub: .*choose a folder"),
        files.exclusive_lock(tmp_path / "file" / "sub" / "data"),
    ):
        pass


@pytest.mark.parametrize("exists", [False, True])
def test_new_directory_appears_at_the_end(tmp_path, exists):
    target = tmp_path / "found"
    if exists:
        target.mkdir()
    with files.new_directory(target, "out") as folder:
        (folder / "a").write_text("1")
        assert not (target / "a").exists()
    assert names(tmp_path) == ["found"]
    assert names(target) == ["a"]


@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_new_directory_replaces_nothing(tmp_path, when):
    target = tmp_path / "found"

    def fill():
        target.mkdir()
        (target / "precious").write_text("1")

    def make():
        with files.new_directory(target, "out") as folder:
            (folder / "a").write_text("1")
            if when == "meanwhile":
                fill()

    if when == "before":
        fill()
    with pytest.raises(files.UserError, match=r"out: .*found exists already; give a new folder"):
        make()
    assert names(tmp_path) == ["found"]
    assert names(target) == ["precious"]


def test_new_directory_names_what_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(files.UserError, match="file"), files.new_directory(tmp_path / "file" / "found", "out"):
        pass


def test_the_names_of_a_folder_and_of_those_above_it_are_flushed(tmp_path, monkeypatch):
    folder = tmp_path / "runs" / "name" / "checkpoints"
    folder.mkdir(parents=True)
    flushed = []
    monkeypatch.setattr(files, "fsync_path", flushed.append)
    files.fsync_names_of(folder)
    assert flushed[:3] == [tmp_path / "runs" / "name", tmp_path / "runs", tmp_path]
    assert os.path.ismount(flushed[-1])


@pytest.mark.parametrize(("code", "is_raised"), [(errno.EIO, True), (errno.EACCES, False), (errno.EINVAL, False)])
def test_a_folder_that_cannot_be_flushed(tmp_path, monkeypatch, code, is_raised):
    def fail(path):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(files, "fsync_path", fail)
    with pytest.raises(OSError, match=os.strerror(code)) if is_raised else nullcontext():
        files.fsync_names_of(tmp_path)


@pytest.mark.parametrize("before", ["old", None])
@pytest.mark.parametrize("failing", ["copyfile", "fsync_path"])
def test_a_copy_that_fails_leaves_what_was_there(tmp_path, monkeypatch, before, failing):
    path = tmp_path / "manifest.json"
    if before is not None:
        path.write_text(before)

    def cannot(source, target):
        raise OSError(errno.EXDEV, "cannot rename")

    def fail_once(*arguments):
        monkeypatch.undo()
        path.write_text("ne")
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "replace", cannot)
    monkeypatch.setattr(files.shutil if failing == "copyfile" else files, failing, fail_once)
    with pytest.raises(OSError, match="full"), files.atomic_file(path, may_copy=True) as file:
        file.write(b"new")
    assert [(found.name, found.read_text()) for found in tmp_path.iterdir()] == (
        [] if before is None else [("manifest.json", before)]
    )
