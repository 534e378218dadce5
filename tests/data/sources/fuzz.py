"""Fuzzing of the readers with hypothesis. Usage: python -m tests.data.sources.fuzz [SECONDS_PER_READER]"""

import bz2
import gzip
import hashlib
import io
import lzma
import random
import sys
import tarfile
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from muse_lightning.data.documents import DamagedSource, DocumentSource, ReadLimits, SourceUnit
from muse_lightning.data.sources import Archives, GitRepositories, Tables
from muse_lightning.data.sources.declarations import NAMES, read_declaration
from muse_lightning.data.sources.local import clean_path
from muse_lightning.data.sources.table_rows import bounded_lines
from muse_lightning.data.sources.unpacking import BoundedStream
from muse_lightning.errors import UserError
from tests.data.sources.builders import REPOSITORIES, git, git_repository, special, tar, zipped

LIMITS = ReadLimits(max_file_bytes=20_000, max_members=200, max_unpacked_bytes=4 << 20, max_ratio=50)
Reader = Callable[[int], None]

# Bytes that headers give a meaning to.
_TELLING = [
    b"\0",
    b"\xff" * 4,
    b"\xff" * 8,
    b"\x80" + bytes(7),
    b"/",
    b"../",
    b"9" * 11,
    b"-1",
    b"\0\0\0\x7f",
    b"PK",
    b"=",
    b"\n",
]


@st.composite
def mutated(draw: st.DrawFn, whole: bytes) -> bytes:
    """A valid file with a few faults: bytes replaced, inserted, removed, repeated, and its end cut off."""
    data = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(len(data) - 1, 0)))
        length = draw(st.integers(1, 64))
        fault = draw(st.sampled_from(["flip", "replace", "insert", "remove", "repeat", "cut"]))
        telling = draw(st.one_of(st.sampled_from(_TELLING), st.binary(min_size=1, max_size=8)))
        if fault == "flip" and data:
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif fault == "replace":
            data[at : at + len(telling)] = telling
        elif fault == "insert":
            data[at:at] = telling
        elif fault == "remove":
            del data[at : at + length]
        elif fault == "repeat":
            data[at:at] = data[at : at + length] * draw(st.integers(1, 3))
        elif fault == "cut":
            del data[at:]
    return bytes(data)


def check(units: list[SourceUnit]) -> None:
    """Read units to their ends under the contract of every source."""
    for unit in units:
        try:
            for repository in unit.read(LIMITS):
                assert repository.name
                total = 0
                for file in repository.files:
                    assert clean_path(file.path) == file.path, file.path
                    assert len(file.content) <= LIMITS.max_file_bytes
                    total += len(file.content)
                assert total <= 64 << 20
                assert all(count > 0 for count in repository.skipped.values())
        except DamagedSource as error:
            _check_message(error)


def _check_message(error: Exception) -> None:
    if "\n" in str(error) or len(str(error)) > 2000:
        raise AssertionError(f"not one line: {error}")


def check_source(make: Callable[[], DocumentSource]) -> None:
    try:
        units = list(make().units())
    except UserError as error:
        _check_message(error)
        return
    check(units)


def run(test: Callable[..., None], strategy: st.SearchStrategy, max_examples: int) -> None:
    """The given test on `max_examples` inputs, without a data base of failures."""
    configured = settings(
        max_examples=max_examples, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )
    configured(given(strategy)(test))()


def _archive(max_examples: int, name: str, whole: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name

        def test(content: bytes) -> None:
            path.write_bytes(content)
            check_source(lambda: Archives(path))

        run(test, mutated(whole), max_examples)


def _members() -> list:
    members = [(f"alpha-1.0/{path}", content) for path, content in REPOSITORIES["alpha"].items()]
    members += [("alpha-1.0/" + "long" * 60, b"long name\n"), ("alpha-1.0/PKG-INFO", b"Name: alpha\nVersion: 1\n")]
    return members


def _plain_tar(file_format: int) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=file_format) as archive:
        for name, content in _members():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            info.pax_headers = {"comment": "é" * 20} if file_format == tarfile.PAX_FORMAT else {}
            archive.addfile(info, io.BytesIO(content))
        for info, _ in (special("alpha-1.0/link", tarfile.SYMTYPE, "/etc/passwd"), special("d", tarfile.DIRTYPE)):
            archive.addfile(info)
    return buffer.getvalue()


def fuzz_pax_tar(max_examples: int) -> None:
    _archive(max_examples, "alpha-1.0.tar", _plain_tar(tarfile.PAX_FORMAT))


def fuzz_gnu_tar(max_examples: int) -> None:
    _archive(max_examples, "alpha-1.0.tar", _plain_tar(tarfile.GNU_FORMAT))


def fuzz_tar_gz(max_examples: int) -> None:
    _archive(max_examples, "alpha-1.0.tar.gz", gzip.compress(_plain_tar(tarfile.PAX_FORMAT), mtime=0))


def fuzz_tar_gz_inside(max_examples: int) -> None:
    """A broken archive in a whole gzip stream."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "alpha-1.0.tar.gz"

        def test(content: bytes) -> None:
            path.write_bytes(gzip.compress(content, 1, mtime=0))
            check_source(lambda: Archives(path))

        run(test, mutated(_plain_tar(tarfile.PAX_FORMAT)), max_examples)


def fuzz_tar_xz(max_examples: int) -> None:
    _archive(max_examples, "alpha-1.0.tar.xz", lzma.compress(_plain_tar(tarfile.GNU_FORMAT)))


def fuzz_tar_bz2(max_examples: int) -> None:
    _archive(max_examples, "alpha-1.0.tar.bz2", bz2.compress(_plain_tar(tarfile.GNU_FORMAT)))


def fuzz_zip(max_examples: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        whole = zipped(Path(folder) / "a.zip", _members()).read_bytes()
    _archive(max_examples, "alpha-1.0.zip", whole)


def fuzz_zip_stored(max_examples: int) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, content in _members():
            archive.writestr(name, content)
    _archive(max_examples, "alpha-1.0.whl", buffer.getvalue())


def fuzz_any_bytes_as_archive(max_examples: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.tar.gz"

        def test(content: bytes) -> None:
            path.write_bytes(content)
            check_source(lambda: Archives(path))

        magic = st.sampled_from(
            [b"", b"PK\x03\x04", b"PK\x05\x06", b"\x1f\x8b\x08\0", b"BZh9", b"\xfd7zXZ\0", b"(\xb5/\xfd"]
        )
        run(test, st.tuples(magic, st.binary(max_size=2000)).map(b"".join), max_examples)


def fuzz_member_names(max_examples: int) -> None:
    """Names of every kind in a whole archive: nothing leaves its root, nothing is lost without being counted."""
    parts = st.sampled_from(["a", "b", "..", ".", "", "\\", "C:", "é", "\udce9", "x" * 300, "a\\..\\b", " ", "\n"])

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.tar"

        def test(names: list[str]) -> None:
            tar(path, [(name, b"x\n") for name in names], "w")
            (unit,) = Archives(path, exclude=()).units()
            (repository,) = unit.read(LIMITS)
            given_paths = [file.path for file in repository.files]
            assert len(given_paths) == len(set(given_paths))
            assert all(clean_path(name) == name and not name.startswith("/") for name in given_paths)
            assert len(given_paths) + repository.skipped.total() == len(names)

        name = st.lists(parts, min_size=1, max_size=5).map("/".join).filter(lambda text: text.strip("/") != "")
        run(test, st.lists(name, min_size=1, max_size=8), max_examples)


def fuzz_metadata(max_examples: int) -> None:
    def test(name: str, content: bytes) -> None:
        found = read_declaration(name, content)
        assert found.name is None or ("\n" not in found.name and ".." not in found.name.split("/"))

    whole = b"Metadata-Version: 2.4\nName: kit\nVersion: 1.0\nLicense-Expression: MIT\nClassifier: License :: X\n\nText"
    npm = b'{"name": "@scope/kit", "version": "1.0.0", "license": {"type": "MIT"}}'
    content = st.one_of(mutated(whole), mutated(npm), st.binary(max_size=500))
    run(lambda pair: test(*pair), st.tuples(st.sampled_from(NAMES), content), max_examples)


def fuzz_json_lines(max_examples: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.jsonl"

        def test(content: bytes) -> None:
            path.write_bytes(content)
            check_source(lambda: Tables([str(path)], path="path"))

        line = b'{"repo_name": "a/x", "path": "src/one.py", "text": "one \\u00e9\\ud800\\n", "n": [1, 2.5e3, null]}\n'
        run(test, st.one_of(mutated(line * 3), mutated(gzip.compress(line * 3, mtime=0))), max_examples)


def fuzz_lines(max_examples: int) -> None:
    """Lines, whatever pieces they come in, are those of `bytes.split`."""

    def test(pair: tuple[bytes, int]) -> None:
        data, limit = pair
        found = list(bounded_lines(BoundedStream(io.BytesIO(data), 1 << 20, 1 << 20), limit))
        expected = data.split(b"\n")
        expected = expected if expected[-1] else expected[:-1]
        assert found == [None if len(line) > limit else line for line in expected]

    run(
        test, st.tuples(st.binary(max_size=300).map(lambda b: b.replace(b"a", b"\n")), st.integers(0, 40)), max_examples
    )


def fuzz_parquet(max_examples: int) -> None:
    import pyarrow
    from pyarrow import parquet

    rows = [{"repo_name": "a", "path": f"{number}.py", "text": "text " * number} for number in range(20)]
    buffer = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(rows), buffer, row_group_size=7, compression="snappy")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.parquet"

        def test(content: bytes) -> None:
            path.write_bytes(content)
            check_source(lambda: Tables([str(path)], path="path"))

        # A process is started for each.
        run(test, mutated(buffer.getvalue()), max(max_examples // 20, 2))


def _git(max_examples: int, pack: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        repository = git_repository(Path(folder) / "alpha", REPOSITORIES["alpha"])
        if pack:
            git(repository, "gc", "--quiet", "--aggressive")
        store = repository / ".git"
        files = sorted(path for path in (store / "objects").rglob("*") if path.is_file() and path.parent.name != "info")
        files += [path for path in (store / "HEAD", store / "packed-refs") if path.exists()]
        contents = {path: path.read_bytes() for path in files}
        for path in files:
            path.chmod(0o600)

        def test(pair: tuple[Path, bytes]) -> None:
            path, content = pair
            path.write_bytes(content)
            try:
                check_source(lambda: GitRepositories([str(repository)]))
            finally:
                path.write_bytes(contents[path])

        one = st.sampled_from(files).flatmap(lambda path: st.tuples(st.just(path), mutated(contents[path])))
        run(test, one, max_examples)


def fuzz_git_loose(max_examples: int) -> None:
    _git(max_examples, pack=False)


def fuzz_git_packed(max_examples: int) -> None:
    _git(max_examples, pack=True)


def fuzz_git_trees(max_examples: int) -> None:
    """Tree objects with right digests and wrong content."""
    with tempfile.TemporaryDirectory() as folder:
        repository = git_repository(Path(folder) / "alpha", REPOSITORIES["alpha"])
        blob, tree = (git(repository, "rev-parse", name) for name in ("HEAD:README.md", "HEAD:src"))
        entries = b"100644 README.md\0" + bytes.fromhex(blob) + b"40000 src\0" + bytes.fromhex(tree)

        def test(content: bytes) -> None:
            wrong = _write_object(repository, b"tree", content)
            text = b"tree %s\nauthor a <a@b> 0 +0000\ncommitter a <a@b> 0 +0000\n\nx\n" % wrong.encode()
            commit = _write_object(repository, b"commit", text)
            check_source(lambda: GitRepositories([f"{repository}#{commit}"]))

        run(test, mutated(entries), max_examples)


def _write_object(repository: Path, kind: bytes, content: bytes) -> str:
    """What `git hash-object --literally` writes, without starting git."""
    whole = b"%s %d\0%s" % (kind, len(content), content)
    name = hashlib.sha1(whole).hexdigest()
    path = repository / ".git" / "objects" / name[:2] / name[2:]
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(zlib.compress(whole))
    return name


TARGETS: list[Reader] = [value for name, value in sorted(globals().items()) if name.startswith("fuzz_")]


def main(seconds: float) -> None:
    """Every reader for about as many seconds, in rounds with new inputs each; a line each."""
    for target in TARGETS:
        started, executions = time.monotonic(), 0
        while time.monotonic() - started < seconds:
            random.seed()
            target(500)
            executions += 500
        print(
            f"{target.__name__}: {executions:,} executions in {time.monotonic() - started:.0f} s, no finding",
            flush=True,
        )


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 10.0)
