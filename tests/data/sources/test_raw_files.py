"""Disks and networks that fail are no damage: the preparation stops with a line that names file and cause."""

import errno
import gzip
import io
import os
import signal
from pathlib import Path

import pytest

from muse_lightning.data.sources import Archives, Tables, parquet_reader, raw_files
from muse_lightning.errors import UserError
from tests.data.sources.builders import LIMITS, json_lines, read_all, tar, write, zipped
from tests.data.sources.servers import file_server
from tests.data.sources.test_tables import ROWS, parquet

ERRORS = [errno.EIO, errno.EACCES, errno.ENOSPC, errno.ECONNRESET, errno.ETIMEDOUT, errno.ESTALE]
MEMBERS = [(f"a/{number}.txt", os.urandom(9000)) for number in range(50)]


class Failing(io.FileIO):
    """A file on a disk that fails from some byte on."""

    number = errno.EIO
    good_bytes = 0

    def read(self, size: int = -1) -> bytes:
        if self.tell() >= self.good_bytes:
            raise OSError(self.number, os.strerror(self.number))
        return super().read(size)


def archive(root: Path, kind: str) -> Path:
    return zipped(root / "a.zip", MEMBERS) if kind == "zip" else tar(root / "a.tar", MEMBERS, kind)


@pytest.mark.parametrize(
    ("kind", "number"),
    [*((kind, errno.EIO) for kind in ("zip", "w", "w:bz2", "w:xz")), *(("w:gz", number) for number in ERRORS)],
)
@pytest.mark.parametrize("good_bytes", [0, 200_000])
def test_archives(tmp_path, monkeypatch, kind, good_bytes, number):
    (unit,) = Archives(archive(tmp_path, kind)).units()
    assert read_all(unit) == len(MEMBERS)
    failing = type("Failing", (Failing,), {"number": number, "good_bytes": good_bytes})
    monkeypatch.setattr(raw_files, "open", lambda name, mode, buffering: failing(name, mode), raising=False)
    with pytest.raises(UserError, match=rf"a\.(zip|tar): cannot be read: {os.strerror(number)}; it is not") as error:
        read_all(unit)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("number", ERRORS, ids=errno.errorcode.get)
def test_archives_that_cannot_be_opened(tmp_path, monkeypatch, number):
    (unit,) = Archives(archive(tmp_path, "w:gz")).units()

    def refuse(name: str, *arguments: object, **options: object) -> None:
        raise OSError(number, os.strerror(number), name)

    monkeypatch.setattr(raw_files, "open", refuse, raising=False)
    with pytest.raises(UserError, match=rf"a\.tar: cannot be read: {os.strerror(number)}; "):
        read_all(unit)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet"])
@pytest.mark.parametrize("good_bytes", [0, 1000])
def test_tables_over_a_network_that_breaks_off(tmp_path, name, good_bytes):
    rows = [{**row, "license": "MIT", "text": os.urandom(20_000).hex()} for row in ROWS]
    if name.endswith("parquet"):
        parquet(tmp_path / name, rows)
    else:
        place = json_lines(tmp_path / name, rows)
        if name.endswith("gz"):
            place.write_bytes(gzip.compress(place.read_bytes()))
    with file_server(tmp_path) as server:
        (unit,) = Tables([f"{server.url}/{name}"], path="path", licence="license").units()
        assert read_all(unit, LIMITS) == 0  # all are oversize
        server.breaks_off_after = good_bytes
        with pytest.raises(UserError, match=rf"^http://127.0.0.1:\d+/{name}: cannot be read: \S") as error:
            read_all(unit)
    assert "\n" not in str(error.value)
    assert "Warning" not in str(error.value)


def test_no_space_for_what_is_said_to_the_reader_of_parquet(tmp_path, monkeypatch):
    (unit,) = Tables([str(parquet(tmp_path / "a.parquet", ROWS[2:3]))], path="path").units()

    def full() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("tempfile.TemporaryFile", full)
    with pytest.raises(UserError, match=r"a\.parquet: cannot be read: No space left on device; "):
        read_all(unit)


def test_a_reader_of_parquet_that_is_killed_is_no_damage(tmp_path, monkeypatch):
    (unit,) = Tables([str(parquet(tmp_path / "a.parquet", ROWS[2:3]))], path="path").units()
    write(tmp_path / "killed.py", f"import os\nos.kill(os.getpid(), {int(signal.SIGKILL)})\n".encode())
    monkeypatch.setattr(parquet_reader, "__name__", "killed")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(UserError, match=r"a\.parquet: its reader was killed, most likely for lack of memory"):
        read_all(unit)


def test_a_reader_of_parquet_that_crashes_when_it_is_done_is_no_damage(tmp_path, monkeypatch):
    (unit,) = Tables([str(parquet(tmp_path / "a.parquet", ROWS[2:3]))], path="path").units()
    reader = f"import atexit, os\natexit.register(os.abort)\nfrom {parquet_reader.__name__} import main\n"
    write(tmp_path / "crashing.py", reader.encode())
    monkeypatch.setattr(parquet_reader, "__name__", "crashing")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    assert read_all(unit) == 1


def test_parquet_at_a_server_without_ranges(tmp_path):
    parquet(tmp_path / "a.parquet", [{**ROWS[2], "license": "MIT"}])
    with file_server(tmp_path) as server:
        server.has_ranges = False
        with pytest.raises(UserError, match=r"a\.parquet: cannot be read: \S"):
            list(Tables([f"{server.url}/a.parquet"], path="path").units())
