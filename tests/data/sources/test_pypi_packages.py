"""Releases of a package index, from one that lies in a folder."""

import hashlib
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest

from muse_lightning.data.sources import PyPIPackages
from muse_lightning.data.sources.package_index import PackageIndex
from muse_lightning.errors import UserError
from tests.data.sources.builders import LIMITS, contents, tar, write, zipped

METADATA = b"Metadata-Version: 2.4\nName: Kit\nVersion: 1.0\nLicense-Expression: MIT\n"


@pytest.fixture
def index(tmp_path: Path) -> Path:
    """`kit` 1.0 as source distribution and wheel, `wheel-only` 2.0 as two wheels."""
    files = [
        tar(tmp_path / "files" / "kit-1.0.tar.gz", [("kit-1.0/PKG-INFO", METADATA), ("kit-1.0/setup.py", b"sdist\n")]),
        zipped(tmp_path / "files" / "kit-1.0-py3-none-any.whl", [("kit/a.py", b"wheel\n")]),
        zipped(tmp_path / "files" / "wheel_only-2.0-cp311-cp311-win_amd64.whl", [("w/a.py", b"windows\n")]),
        zipped(tmp_path / "files" / "wheel_only-2.0-py3-none-any.whl", [("w/a.py", b"any\n"), ("w/b.py", b"b\n")]),
    ]
    for name in ("kit", "wheel-only"):
        digests = {file: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
        links = [f'<a href="{file.as_uri()}#sha256={digests[file]}">{file.name}</a>' for file in files]
        write(tmp_path / "simple" / name / "index.html", "".join(links).encode())
    return tmp_path / "simple"


def source(index: Path, *packages: str) -> PyPIPackages:
    return PyPIPackages(list(packages), index_url=str(index), cache=index.parent / "cache")


def test_source_distributions_come_before_wheels(index):
    assert contents(source(index, "Kit==1.0", "wheel-only==2.0")) == {
        "Kit": {"PKG-INFO": METADATA, "setup.py": b"sdist\n"},
        "wheel-only": {"a.py": b"any\n", "b.py": b"b\n"},
    }
    (unit,) = source(index, "kit==1.0").units()
    (repository,) = unit.read(LIMITS)
    assert (unit.name, repository.revision, repository.licence) == ("kit==1.0", "1.0", "MIT")


def test_a_release_is_asked_for_once(index, monkeypatch):
    units = list(source(index, "kit==1.0").units())
    (index / "kit" / "index.html").unlink()
    assert list(source(index, "kit==1.0").units()) == units
    assert not list((index.parent / "cache" / "pypi").glob("*.partial"))


def test_another_preparation_may_fetch_the_same_at_the_same_time(index, monkeypatch):
    """Both have fetched all before one of them puts anything into the cache."""
    together, download = Barrier(4, timeout=30), PackageIndex.download

    def download_together(*arguments) -> None:
        download(*arguments)
        together.wait()

    monkeypatch.setattr(PackageIndex, "download", download_together)
    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(lambda _: list(source(index, "kit==1.0", "wheel-only==2.0").units()), range(2))
    assert one == other
    assert len(one) == 2
    assert sorted(path.name for path in (index.parent / "cache" / "pypi").iterdir()) == ["kit==1.0", "wheel-only==2.0"]


@pytest.mark.parametrize("place", ["cache", "cache/pypi", "cache/pypi/kit==1.0"])
def test_a_cache_that_cannot_be_written_is_one_line(index, place):
    write(index.parent / place, b"no folder")
    with pytest.raises(UserError, match=r"PyPIPackages: cannot write .*kit==1\.0: (Not a directory|File exists)"):
        list(source(index, "kit==1.0").units())


def test_a_full_disk_is_no_fault_of_the_network(index, longest_file):
    longest_file(64)
    with pytest.raises(UserError, match=r"cannot write .*==1\.0: File too large; choose another cache$"):
        list(source(index, "kit==1.0").units())
    assert not list((index.parent / "cache" / "pypi").iterdir())


def test_a_file_that_is_not_what_the_index_says_is_refused(index):
    write(index.parent / "files" / "kit-1.0.tar.gz", b"another file")
    with pytest.raises(UserError, match="Hash mismatch") as error:
        list(source(index, "kit==1.0").units())
    assert "\n" not in str(error.value)
    assert not list((index.parent / "cache" / "pypi").iterdir())


def test_a_pinned_file_is_compared(index):
    digest = hashlib.sha256((index.parent / "files" / "kit-1.0.tar.gz").read_bytes()).hexdigest()
    assert contents(source(index, f"kit==1.0 --hash=sha256:{digest}"))["Kit"]
    with pytest.raises(UserError, match=f"SHA-256 {digest} found, 0000"):
        list(source(index, f"kit==1.0 --hash=sha256:{'0' * 64}").units())


@pytest.mark.parametrize(
    ("packages", "message"),
    [
        (["kit"], "name==version expected, with one exact version"),
        (["kit>=1"], "name==version expected"),
        (["kit==1.*"], "name==version expected"),
        (["kit @ https://example.com/kit.tar.gz"], "name==version expected"),
        (["../kit==1"], "'../kit==1' found; name==version expected"),
        (["kit==1.0 --hash=md5:abc"], "--hash=sha256: and 64 digits expected"),
        (["kit==1.0", "Kit==1.0"], "kit==1.0 is named twice"),
        (["kit==3.0"], "the index has no such release"),
        (["none==1.0"], "none==1.0: "),
        ([], "packages is empty"),
    ],
)
def test_bad_lists_are_one_line(index, packages, message):
    with pytest.raises(UserError, match=message) as error:
        list(source(index, *packages).units())
    assert "\n" not in str(error.value)


def test_without_unearth_one_line_says_what_to_install(index, monkeypatch):
    monkeypatch.setitem(sys.modules, "unearth", None)
    with pytest.raises(UserError, match=r"pip install 'muse-lightning\[pypi\]'"):
        list(source(index, "kit==1.0").units())
