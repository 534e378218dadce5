"""Tables: grouping, paths, licences, formats, and rows that cannot be used."""

import bz2
import gzip
import io
import itertools
import json
import lzma
import os
import tracemalloc
from dataclasses import replace
from itertools import chain
from pathlib import Path

import fsspec
import psutil
import pyarrow.parquet
import pytest
import zstandard

from muse_lightning.data.documents import DamagedSource
from muse_lightning.data.filters import Filters
from muse_lightning.data.packs import read_jobs
from muse_lightning.data.sources import Tables, parquet_reader
from muse_lightning.data.sources.table_rows import bounded_lines
from muse_lightning.data.sources.unpacking import BoundedStream
from muse_lightning.errors import UserError
from tests.data.sources.builders import LIMITS, contents, counted, json_lines, read_all, write

ROWS = [
    {"repo_name": "a/x", "path": "src/one.py", "text": "one\n", "license": "MIT"},
    {"repo_name": "a/x", "path": "two.py", "text": "two é\n", "license": ["MIT"]},
    {"repo_name": "b/y", "path": "three.py", "text": "three\n", "license": None},
    {"repo_name": "a/x", "path": "four.py", "text": "four\n", "license": "ISC"},
]
CONTENTS = {
    "a/x": {"src/one.py": b"one\n", "two.py": "two é\n".encode(), "four.py": b"four\n"},
    "b/y": {"three.py": b"three\n"},
}


def source(*files: Path | str, **arguments) -> Tables:
    return Tables([str(file) for file in files], **{"path": "path", "licence": "license", **arguments})


def parquet(path: Path, rows: list[dict], **arguments) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, **arguments)
    return path


def test_rows_of_a_group_are_one_document(tmp_path):
    assert contents(source(json_lines(tmp_path / "a.jsonl", ROWS))) == CONTENTS


def test_a_document_begins_anew_where_group_or_licence_changes(tmp_path):
    (unit,) = source(json_lines(tmp_path / "a.jsonl", ROWS)).units()
    read = [(piece.name, piece.licence, len(list(piece.files))) for piece in unit.read(LIMITS)]
    assert read == [("a/x", "MIT", 2), ("b/y", None, 1), ("a/x", "ISC", 1)]


@pytest.mark.parametrize(("pack", "ending"), [(gzip.compress, "gz"), (bz2.compress, "bz2"), (lzma.compress, "xz")])
def test_packed_lines(tmp_path, pack, ending):
    plain = json_lines(tmp_path / "plain", ROWS).read_bytes()
    assert contents(source(write(tmp_path / f"a.jsonl.{ending}", pack(plain)))) == CONTENTS


def test_lines_packed_by_zstd_in_several_frames(tmp_path):
    plain = json_lines(tmp_path / "plain", ROWS).read_bytes()
    packed = zstandard.compress(plain[:100]) + zstandard.compress(plain[100:])
    assert contents(source(write(tmp_path / "a.jsonl.zst", packed))) == CONTENTS


def test_parquet(tmp_path):
    rows = [{**row, "license": "MIT"} for row in ROWS]
    place = parquet(tmp_path / "a.parquet", rows, row_group_size=2)
    assert contents(source(place)) == CONTENTS
    (unit,) = source(place).units()
    assert [piece.licence for piece in unit.read(LIMITS)] == ["MIT"] * 3


def test_lists_of_licences_in_parquet(tmp_path):
    rows = [{**row, "license": ["MIT"]} for row in ROWS[:2]] + [{**ROWS[2], "license": ["MIT", "ISC"]}]
    (unit,) = source(parquet(tmp_path / "a.parquet", rows)).units()
    assert [(piece.name, piece.licence) for piece in unit.read(LIMITS)] == [("a/x", "MIT"), ("b/y", None)]


def test_remote_tables_through_fsspec():
    system = fsspec.filesystem("memory")
    system.pipe("/bucket/a.jsonl", b"".join(json.dumps(row).encode() + b"\n" for row in ROWS[:2]))
    system.pipe("/bucket/b.jsonl.gz", gzip.compress(b"".join(json.dumps(row).encode() + b"\n" for row in ROWS[2:])))
    try:
        found = source("memory://bucket/*.jsonl*")
        assert contents(found) == CONTENTS
        before = [unit.stamp for unit in found.units()]
        system.pipe("/bucket/a.jsonl", json.dumps(ROWS[0]).encode())
        after = [unit.stamp for unit in found.units()]
        assert before[0] != after[0]
        assert before[1] == after[1]
    finally:
        system.rm("/bucket", recursive=True)


def test_what_a_file_system_tells_of_a_request_is_no_change(monkeypatch):
    system = fsspec.filesystem("memory")
    system.pipe("/bucket/a.jsonl", b"".join(json.dumps(row).encode() + b"\n" for row in ROWS))
    told, requests = type(system).info, itertools.count()

    def info(self, path: str, **options) -> dict:
        found = {**told(self, path, **options), "request": next(requests), "url": f"https://host/a?{next(requests)}"}
        del found["size"]
        return found

    monkeypatch.setattr(type(system), "info", info)
    try:
        found = source("memory://bucket/a.jsonl")
        before = [unit.stamp for unit in found.units()]
        assert [unit.stamp for unit in found.units()] == before
        assert contents(found) == CONTENTS
    finally:
        system.rm("/bucket", recursive=True)


def test_a_question_mark_in_a_path_is_no_query(tmp_path):
    place = parquet(tmp_path / "what?" / "year=2024" / "a.parquet", [{**row, "license": "MIT"} for row in ROWS])
    for name in (str(place), f"file://{place}"):
        assert contents(source(name)) == CONTENTS
        assert [unit.name for unit in source(name).units()] == [f"file://{place}"]


def test_paths_of_row_numbers(tmp_path):
    place = json_lines(tmp_path / "a.jsonl", [{"repo_name": "a", "text": "x"}, {"repo_name": "a", "text": "y"}])
    found = contents(Tables([str(place)], extension=".md"))
    assert found == {"a": {"000000000.md": b"x", "000000001.md": b"y"}}


def test_rows_that_cannot_be_used_are_counted(tmp_path):
    place = json_lines(tmp_path / "a.jsonl", [ROWS[0]])
    bad = [
        b"no json",
        b'{"repo_name": "a/x", "path": "b.py", "text": 3}',
        b'{"repo_name": null, "path": "b.py", "text": "x"}',
        b'["a", "list"]',
        b"[" * 100_000,
        b'{"repo_name": ' + b"9" * 5000 + b"}",
        b"\xff\xfe",
        b"\0",
        json.dumps({**ROWS[0], "path": "../../etc/passwd"}).encode(),
        json.dumps({**ROWS[0], "path": "/etc/passwd"}).encode(),
        json.dumps({**ROWS[0], "text": "x" * 10_001}).encode(),
        json.dumps({**ROWS[0], "other": "x" * 2_000_000}).encode(),
        b"",
    ]
    place.write_bytes(place.read_bytes() + b"\n".join(bad) + b"\n" + json.dumps(ROWS[1]).encode())
    found = source(place)
    assert contents(found) == {"a/x": {"src/one.py": b"one\n", "two.py": "two é\n".encode()}}
    assert counted(found) == {"malformed": 8, "outside": 2, "oversize": 2}


def test_half_a_surrogate_pair_in_a_name_is_a_question_mark(tmp_path):
    """JSON can spell what no bytes stand for."""
    rows = json_lines(tmp_path / "a.jsonl", [{"text": "x = 1\n" * 9, "repo_name": "a\ud800b", "path": "\ud800.py"}])
    source = Tables([str(rows)], path="path")
    (job,) = read_jobs([(0, unit) for unit in source.units()], [source.identity()], Filters(), LIMITS, 1)
    (tmp_path / "pack").mkdir()
    assert job.run(tmp_path / "pack", None, lambda *_: None)["files"] == 1
    assert (tmp_path / "pack" / "names.bin").read_bytes() == b"a?b"
    assert (tmp_path / "pack" / "content.bin").read_bytes() == b"?.py" + 9 * b"x = 1\n"


def test_a_table_without_one_usable_row_counts_them(tmp_path):
    rows = json_lines(tmp_path / "a.jsonl", [{"text": None, "repo_name": "a"}, [], {"text": "x", "repo_name": ""}])
    assert counted(source(rows, path=None, licence=None)) == {"malformed": 3}


def test_a_column_may_be_missing_in_some_rows(tmp_path):
    place = json_lines(tmp_path / "a.jsonl", [{"repo_name": "a", "text": "x"}, ROWS[0]])
    assert set(contents(source(place))) == {"a", "a/x"}


def test_columns_of_parquet_are_compared(tmp_path):
    with pytest.raises(UserError, match="no column 'texts'; nearest: text"):
        list(source(parquet(tmp_path / "a.parquet", [{**row, "license": "MIT"} for row in ROWS]), text="texts").units())


def test_a_row_group_of_gigabytes_is_refused(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(parquet_reader, "_MAX_COLUMN_CHUNK", 1000)
    place = parquet(tmp_path / "a.parquet", [{**ROWS[2], "license": "MIT", "text": os.urandom(2000).hex()}])
    assert parquet_reader.write_rows(str(place), ["text"]) == parquet_reader.DAMAGED
    assert "column 'text' has 12,0" in capfd.readouterr().err


def test_a_reader_that_aborts_is_a_damaged_table(tmp_path, monkeypatch):
    place = parquet(tmp_path / "a.parquet", [{**row, "license": "MIT"} for row in ROWS])
    (unit,) = source(place).units()
    abort = write(
        tmp_path / "aborting.py", b"import os, sys\nprint('last words', file=sys.stderr, flush=True)\nos.abort()\n"
    )
    monkeypatch.setattr(parquet_reader, "__name__", abort.stem)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(DamagedSource, match=r"^its reader died: last words"):
        list(unit.read(LIMITS))


def test_a_table_that_is_not_read_to_its_end_leaves_no_process(tmp_path):
    rows = [{**ROWS[0], "license": "MIT", "repo_name": str(number), "text": "x" * 9000} for number in range(200)]
    (unit,) = source(parquet(tmp_path / "a.parquet", rows)).units()
    before = psutil.Process().children()
    pieces = unit.read(LIMITS)
    next(pieces)
    assert len(psutil.Process().children()) == len(before) + 1
    pieces.close()
    assert psutil.Process().children() == before


class Endless(io.RawIOBase):
    """One line of many gigabytes that exists in no memory, then one of three bytes."""

    def __init__(self, size: int) -> None:
        self.pieces = chain((bytes(1 << 20) for _ in range(size >> 20)), [b"\nabc"])

    def read(self, size: int = -1) -> bytes:
        return next(self.pieces, b"")


def test_a_line_of_two_gigabytes_is_passed_over_in_bounded_memory():
    stream = BoundedStream(Endless(2 << 30), 4 << 30, 1 << 20)
    tracemalloc.start()
    try:
        assert list(bounded_lines(stream, 1_000_000)) == [None, b"abc"]
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def test_lines_are_those_of_python(tmp_path):
    data = b"a\n\nbb\r\n" + b"c" * 100 + b"\n" + b"d"
    for limit_at_once in (1, 3, 1 << 20):
        stream = BoundedStream(io.BytesIO(data), 1000, max(limit_at_once, 1 << 20))
        assert list(bounded_lines(stream, 100)) == data.split(b"\n")


@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_a_damaged_packed_table_is_one_line(tmp_path, damage):
    whole = gzip.compress(
        json_lines(tmp_path / "plain", [{**ROWS[0], "text": os.urandom(2000).hex()}] * 5).read_bytes()
    )
    middle = len(whole) // 2
    broken = whole[:middle] if damage == "truncated" else whole[:middle] + b"\xff\xff\xff\xff" + whole[middle + 4 :]
    (unit,) = source(write(tmp_path / "a.jsonl.gz", broken)).units()
    with pytest.raises(DamagedSource, match=r"^is damaged: ") as error:
        read_all(unit)
    assert "\n" not in str(error.value)


def test_a_packed_bomb_is_refused_by_its_ratio(tmp_path):
    row = json.dumps({**ROWS[0], "text": "x" * 5000}).encode() + b"\n"
    bomb = write(tmp_path / "a.jsonl.gz", gzip.compress(row * (70_000_000 // len(row))))
    (unit,) = source(bomb).units()
    with pytest.raises(DamagedSource, match="unpacks to more than 67,108,864 bytes"):
        read_all(unit)


@pytest.mark.parametrize("content", [b"", b"PAR1", b"PAR1" + bytes(100) + b"PAR1", b"no parquet at all"])
def test_what_is_no_parquet_is_one_line(tmp_path, content):
    (unit,) = source(write(tmp_path / "a.parquet", content)).units()
    with pytest.raises(DamagedSource) as error:
        list(unit.read(LIMITS))
    # Nothing else that its reader may have said, such as warnings.
    assert str(error.value).startswith("is no readable Parquet file: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("files", "arguments", "message"),
    [
        (["{root}/none.jsonl"], {}, "none.jsonl"),
        (["{root}/*.parquet"], {}, r"\*.parquet: no file found"),
        (["{root}/a.csv"], {}, r"names that end in .jsonl"),
        (["{root}/a.jsonl"], {"text": "txt"}, r"no column 'txt'; nearest: text"),
        (["{root}/a.jsonl"], {"group": "repo"}, r"no column 'repo'; nearest: repo_name"),
        (["{root}/a.jsonl"], {"path": "file"}, r"no column 'file'"),
        (["nosuchscheme://x/a.jsonl"], {}, "nosuchscheme"),
        ([], {}, "files is empty"),
    ],
)
def test_bad_places_are_one_line(tmp_path, files, arguments, message):
    json_lines(tmp_path / "a.jsonl", ROWS)
    with pytest.raises(UserError, match=message) as error:
        list(source(*(file.format(root=tmp_path) for file in files), **arguments).units())
    assert "\n" not in str(error.value)


def test_a_file_above_the_limit_is_oversize_by_its_bytes(tmp_path):
    place = json_lines(tmp_path / "a.jsonl", [{**ROWS[0], "text": "é" * 60}])
    assert counted(source(place), replace(LIMITS, max_file_bytes=119)) == {"oversize": 1}
    assert counted(source(place), replace(LIMITS, max_file_bytes=120)) == {}
