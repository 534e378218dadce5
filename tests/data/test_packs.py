"""What a pack holds, and that a damaged unit leaves nothing in it."""

import os
from pathlib import Path

import pytest

from muse_lightning.data import packs
from muse_lightning.data.documents import ReadLimits
from muse_lightning.data.filters import Filters
from muse_lightning.data.packs import Pack, read_jobs
from tests.data.memory_source import MemoryUnit, text

APACHE = (Path(__file__).parents[2] / "LICENSE").read_bytes()


def read(folder: Path, *units: MemoryUnit, filters: Filters | None = None) -> tuple[Pack, dict, list[tuple]]:
    """One pack of all units; its result; name, path, content, language and licence of each file."""
    (job,) = read_jobs([(0, unit) for unit in units], [{}], filters or Filters(), ReadLimits(), 1 << 30)
    folder.mkdir()
    counted = []
    result = job.run(folder, None, lambda *counts: counted.append(counts))
    assert sum(size for size, _, _ in counted) == sum(unit.size for unit in units)
    pack = Pack(folder, result["languages"], result["licences"])
    data, names = pack.content.read_bytes(), pack.names()
    found, position, repositories = [], 0, []
    for row in pack.repositories():
        repositories.append(names[position : position + row["name_bytes"]].decode())
        position += int(row["name_bytes"] + row["revision_bytes"])
    for row in pack.files():
        middle = int(row["offset"]) + int(row["path_bytes"])
        path, content = data[int(row["offset"]) : middle], data[middle : middle + int(row["size"])]
        language, licence = pack.languages[row["language"]], pack.licences[row["licence"]]
        found.append((repositories[row["repository"]], path, content, language, licence))
    assert result["files"] == len(found)
    return pack, result, found


def test_files_paths_and_counts(tmp_path):
    odd = os.fsdecode(b"caf\xe9.c")
    unit = MemoryUnit("u", (("a", {"x.py": b"x = 1\n", "y": b"\0"}), ("b", {odd: b"int x;\n"})), skipped={"symlink": 2})
    _, result, found = read(tmp_path / "p", unit)
    assert found == [
        ("a", b"x.py", b"x = 1\n", "python", "unknown"),
        ("b", b"caf\xe9.c", b"int x;\n", "c", "unknown"),
    ]
    assert result["skipped"] == {"binary": 1, "symlink": 4}


def test_a_licence_counts_for_files_before_it_and_leaves_out_others(tmp_path):
    files = {"a.py": b"x = 1\n", "LICENSE": APACHE}
    units = (
        MemoryUnit("1", (("free", files),), for_licence=("LICENSE",)),
        MemoryUnit("2", (("none", {"b.py": b"y = 1\n"}),)),
        MemoryUnit("3", (("declared", {"c.py": b"z = 1\n"}),), licence="Apache-2.0"),
    )
    _, result, found = read(tmp_path / "p", *units, filters=Filters(licences=["Apache-2.0"]))
    assert [(name, path, licence) for name, path, _, _, licence in found] == [
        ("free", b"a.py", "Apache-2.0"),
        ("declared", b"c.py", "Apache-2.0"),
    ]
    assert result["skipped"] == {"suffix": 1, "licence": 1}


def test_a_damaged_unit_leaves_nothing(tmp_path):
    good = [MemoryUnit(f"{i}", ((f"r{i}", {"f.py": text(i, 100)}),), revision=f"v{i}") for i in range(2)]
    bad = MemoryUnit("bad", (("x", {"g.py": text(7, 5000)}), ("y", {"h.py": b"\0"})), damaged="cut\noff")
    pack, result, found = read(tmp_path / "with", good[0], bad, good[1])
    assert result["damaged"] == [(0, "bad", "cut off")]
    without, expected, files = read(tmp_path / "without", *good)
    assert (found, result["skipped"]) == (files, expected["skipped"])
    for name in ("content.bin", "files.bin", "repositories.bin", "names.bin"):
        assert (pack.folder / name).read_bytes() == (without.folder / name).read_bytes()


class TestKeys:
    def keys(self, *stamps: str, filters: Filters | None = None, pack_bytes: int = 250) -> list[str]:
        units = [(0, MemoryUnit(f"{i}", (("r", {"f": text(i, 100)}),), stamp)) for i, stamp in enumerate(stamps)]
        return [job.key for job in read_jobs(units, [{}], filters or Filters(), ReadLimits(), pack_bytes)]

    def test_of_packs_by_what_is_in_them(self):
        before = self.keys("1", "1", "1", "1")
        assert len(before) == 2  # 3 units of 100 bytes reach 250
        after = self.keys("1", "1", "1", "2")
        assert (after[0] == before[0], after[1] == before[1]) == (True, False)
        assert not set(self.keys("1", "1", "1", "1", filters=Filters(max_file_bytes=7))) & set(before)

    def test_of_packs_by_the_libraries_that_look_at_files(self, monkeypatch):
        before = self.keys("1")
        monkeypatch.setattr(packs, "version", lambda name: f"another {name}")
        assert self.keys("1") != before


def test_numbers_stay_within_16_bits(monkeypatch):
    monkeypatch.setattr(packs, "_MOST_NUMBERS", 2)
    number = packs._Numbers()
    assert [number(text) for text in ("a", "b", "c", None, "d", "a")] == [0, 1, 2, 2, 2, 0]
    assert number.texts() == ["a", "b", packs.UNKNOWN]


@pytest.mark.parametrize("count", [1, 200])
def test_progress_counts_every_file(count, tmp_path):
    unit = MemoryUnit("u", (("a", {f"{i}.py": text(i, 50) for i in range(count)}),))
    (job,) = read_jobs([(0, unit)], [{}], Filters(), ReadLimits(), 1)
    files = []
    job.run(tmp_path, None, lambda size, number, tokens: files.append(number))
    assert sum(files) == count
