"""Folders of repositories, and what any source that reads folders leaves out."""

import os

import pytest

from muse_lightning.data.documents import ReadLimits
from muse_lightning.data.sources import Folders
from muse_lightning.data.sources.local import PathRules, walk
from muse_lightning.errors import UserError
from tests.data.sources.builders import LIMITS, contents, counted, write


def test_sub_folders_are_repositories(tmp_path):
    for path in ("b/src/x.py", "b/README", "a/y.md", "loose.txt", ".git/config", "a/node_modules/z.js"):
        write(tmp_path / "code" / path)
    found = contents(Folders(tmp_path / "code"))
    assert {name: list(files) for name, files in found.items()} == {
        "a": ["y.md"],
        "b": ["README", "src/x.py"],
        "code": ["loose.txt"],
    }
    only = Folders(tmp_path / "code", suffixes=(".py",), exclude=(".*", "a"))
    assert {name: list(files) for name, files in contents(only).items() if files} == {"b": ["src/x.py"]}
    assert counted(only) == {"suffix": 2, "excluded": 2}


def test_loose_files_and_a_sub_folder_of_the_same_name_are_two_units(tmp_path):
    write(tmp_path / "code" / "loose.py")
    write(tmp_path / "code" / "code" / "a.py")
    assert [unit.name for unit in Folders(tmp_path / "code").units()] == ["code", "code/"]


def test_everything_odd_is_counted(tmp_path):
    root = tmp_path / "code" / "repo"
    odd = os.fsdecode(b"caf\xe9.py")
    for path in ("a.py", odd, "deep/b.py"):
        write(root / path)
    write(root / "big.py", b"x" * 10_001)
    (root / "loop").symlink_to(root)
    (root / "self").symlink_to(root / "self")
    (root / "passwd").symlink_to("/etc/passwd")
    os.mkfifo(root / "pipe.py")
    source = Folders(tmp_path / "code")
    assert set(contents(source)["repo"]) == {"a.py", odd, "deep/b.py"}
    assert counted(source) == {"symlink": 3, "special": 1, "oversize": 1}


def test_a_file_that_became_a_link_or_a_pipe_is_not_read(tmp_path):
    secret = write(tmp_path / "secret", b"secret")
    for name in ("a.py", "b.py", "c.py"):
        write(tmp_path / "root" / "repo" / name)
    (unit,) = Folders(tmp_path / "root").units()
    (repository,) = unit.read(LIMITS)
    files = iter(repository.files)
    assert next(files).path == "a.py"
    (tmp_path / "root" / "repo" / "b.py").unlink()
    (tmp_path / "root" / "repo" / "b.py").symlink_to(secret)
    (tmp_path / "root" / "repo" / "c.py").unlink()
    os.mkfifo(tmp_path / "root" / "repo" / "c.py")
    assert list(files) == []
    assert repository.skipped == {"unreadable": 2}


def test_the_order_is_that_of_the_paths_bytes(tmp_path):
    paths = ["a.py", "a/b.py", "a-b/c.py", "a0", "B", "a/b/c", os.fsdecode(b"\xff")]
    for path in paths:
        if path != "a/b/c":
            write(tmp_path / path)
    found = [entry.path for entry in walk(str(tmp_path), PathRules())]
    assert found == sorted((path for path in paths if path != "a/b/c"), key=os.fsencode)


def test_a_deep_tree_is_read(tmp_path):
    folder = tmp_path / "root" / "repo"
    for _ in range(300):
        folder = folder / "d"
    write(folder / "x.py")
    assert len(contents(Folders(tmp_path / "root"), ReadLimits())["repo"]) == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_unreadable_folders_are_counted(tmp_path):
    write(tmp_path / "root" / "repo" / "a.py")
    closed = tmp_path / "root" / "repo" / "closed"
    closed.mkdir(mode=0)
    assert counted(Folders(tmp_path / "root")) == {"unreadable": 1}
    closed.chmod(0o700)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: Folders(root / "none"), r"source folder .*/none: No such file or directory; give a folder"),
        (lambda root: Folders(write(root / "file")), r"source folder .*/file: Not a directory; give a folder"),
        (lambda root: Folders(root), r"source folder .*: no files found; give a folder"),
        (lambda root: Folders(write(root / "a" / "b.c").parent.parent, (".py",)), r"no files that end in .py found"),
    ],
    ids=["missing", "file", "empty", "suffix"],
)
def test_bad_folders_are_one_line(tmp_path, make, message):
    with pytest.raises(UserError, match=message) as error:
        list(make(tmp_path).units())
    assert "\n" not in str(error.value)


def test_a_root_that_is_a_loop_is_one_line(tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(UserError, match="symbolic links"):
        list(Folders(tmp_path / "loop").units())
