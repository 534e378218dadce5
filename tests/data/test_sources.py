"""The contract of every source, and what each one takes for a repository."""

import os
import pickle
import sys
import sysconfig
from itertools import pairwise
from pathlib import Path

import pytest

from muse_lightning.data import DocumentSource, sources
from muse_lightning.data.documents import listing_digest
from muse_lightning.data.sources import Folders, PythonPackages
from muse_lightning.errors import UserError

EXPORTED = [value for name in sources.__all__ if issubclass(value := getattr(sources, name), DocumentSource)]


def test_every_source_is_covered():
    assert len(EXPORTED) == len(sources.__all__) == 2


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A standard library and a site-packages folder of our own, so that a test does not depend on the machine."""
    library, installed = tmp_path / "lib", tmp_path / "lib" / "site-packages"
    for path in ("lib/json/encoder.py", "lib/abc.py", "lib/types.py"):
        write(tmp_path / path)
    for path in (
        "six.py",
        "_hidden.pyi",
        "numpy/core/a.py",
        "numpy-2.0.dist-info/METADATA.py",
        "numpy/__pycache__/a.py",
    ):
        write(installed / path)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(library if name == "stdlib" else installed))
    return tmp_path


def write(path: Path, content: bytes = b"x = 1\n") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def make_source(kind: type[DocumentSource], root: Path) -> DocumentSource:
    return Folders(root) if kind is Folders else PythonPackages()


def paths(source: DocumentSource) -> dict[str, list[str]]:
    return {document.name: [file.path for file in document.files] for document in source.documents()}


@pytest.mark.parametrize("kind", EXPORTED)
def test_contract(kind, packages, monkeypatch):
    root = packages / "lib" / "site-packages"
    # Code that leaves a trace if anything imports or runs it.
    write(root / "trap" / "__init__.py", b"open('trace', 'w')\n")
    write(packages / "secret" / "key.py", b"secret\n")
    (root / "trap" / "out").symlink_to(packages / "secret")
    (root / "trap" / "loop").symlink_to(root / "trap")
    (root / "trap" / "key.py").symlink_to(packages / "secret" / "key.py")
    (root / "linked").symlink_to(packages / "secret")
    os.mkfifo(root / "trap" / "pipe.py")
    odd = os.fsdecode(b"caf\xe9.py")
    write(root / "trap" / odd, b"odd = 1\n")
    monkeypatch.chdir(packages)
    before = set(sys.modules)

    source = make_source(kind, root)
    documents = list(source.documents())
    assert documents == list(make_source(kind, root).documents())
    assert listing_digest(documents) == listing_digest(list(source.documents()))
    names = [document.name for document in documents]
    assert names == sorted(names)
    assert len(set(names)) == len(names)
    trap = next(document for document in documents if document.name == "trap")
    assert [file.path for file in trap.files] == ["__init__.py", odd]
    assert trap.skipped["symlink"] == 3
    assert trap.skipped["special"] == 1
    assert not any("key" in file.path for document in documents for file in document.files)
    assert pickle.loads(pickle.dumps(documents)) == documents
    for document in documents:
        assert document.size == sum(len(file.read()) for file in document.files)
        assert all(a.path < b.path for a, b in pairwise(document.files))
    assert not (packages / "trace").exists()
    assert set(sys.modules) <= before | {"pickle"}
    assert source.identity() == make_source(kind, root).identity()


@pytest.mark.parametrize("kind", EXPORTED)
def test_listing_notices_every_change(kind, packages):
    root = packages / "lib" / "site-packages"
    file = write(root / "numpy" / "core" / "a.py", b"abc\n")

    def digest() -> str:
        return listing_digest(list(make_source(kind, root).documents()))

    seen = [digest()]
    status = file.stat()
    file.write_bytes(b"xyz\n")
    # Same size, modification time put back: only the time of status change tells.
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    seen.append(digest())
    file.rename(file.with_name("b.py"))
    seen.append(digest())
    write(root / "numpy" / "c.py")
    seen.append(digest())
    file.with_name("b.py").unlink()
    seen.append(digest())
    assert len(set(seen)) == len(seen)
    assert digest() == seen[-1]


def test_a_file_that_became_a_link_is_not_read(tmp_path):
    file = write(tmp_path / "root" / "repo" / "a.py")
    write(tmp_path / "secret", b"secret")
    (document,) = Folders(tmp_path / "root").documents()
    file.unlink()
    file.symlink_to(tmp_path / "secret")
    with pytest.raises(OSError, match="symbolic"):
        document.files[0].read()


def test_python_packages_are_repositories(packages):
    prefix = sys.implementation.name
    assert paths(PythonPackages()) == {
        f"{prefix}/json": ["encoder.py"],
        f"{prefix}/modules": ["abc.py", "types.py"],
        "_hidden": ["_hidden.pyi"],
        "numpy": ["core/a.py"],
        "six": ["six.py"],
    }
    assert set(paths(PythonPackages(installed=False))) == {f"{prefix}/json", f"{prefix}/modules"}
    assert set(paths(PythonPackages(standard_library=False))) == {"_hidden", "numpy", "six"}


def test_python_packages_on_this_machine():
    documents = {document.name: document for document in PythonPackages().documents()}
    assert "decoder.py" in [file.path for file in documents[f"{sys.implementation.name}/json"].files]
    assert "__init__.py" in [file.path for file in documents["torch"].files]
    assert len(documents) > 50


def test_sub_folders_are_repositories(tmp_path):
    for path in ("b/src/x.py", "b/README", "a/y.md", "loose.txt", ".git/config", "a/node_modules/z.js"):
        write(tmp_path / "code" / path)
    assert paths(Folders(tmp_path / "code")) == {"a": ["y.md"], "b": ["README", "src/x.py"], "code": ["loose.txt"]}
    only = Folders(tmp_path / "code", suffixes=(".py",), exclude=(".*", "a"))
    assert {name: found for name, found in paths(only).items() if found} == {"b": ["src/x.py"]}
    assert sum(document.skipped.get("suffix", 0) for document in only.documents()) == 2


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
        list(make(tmp_path).documents())
    assert "\n" not in str(error.value)


def test_python_packages_needs_one_part():
    with pytest.raises(UserError, match="set one of them to true"):
        PythonPackages(standard_library=False, installed=False)
