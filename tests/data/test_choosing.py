"""From packs to the documents that are encoded: joined pieces, duplicates, huge repositories, weights, limits."""

from pathlib import Path

import numpy as np
import pytest

from muse_lightning.data.choosing import Documents, choose_documents, read_paths
from muse_lightning.data.documents import ReadLimits
from muse_lightning.data.filters import Filters
from muse_lightning.data.inventory import Inventory, load_inventory, revisions
from muse_lightning.data.packs import FILE, REPOSITORY, Pack, read_jobs
from muse_lightning.data.selection import Limits
from tests.data.memory_source import MemoryUnit, text


@pytest.fixture
def packs(tmp_path):
    """Packs of units, each with the number of its source; a pack for each `pack_bytes`."""
    made = iter(range(100))

    def make(*units: tuple[int, MemoryUnit], pack_bytes: int = 1) -> list[Pack]:
        found = []
        for job in read_jobs(units, [{}], Filters(), ReadLimits(), pack_bytes):
            folder = tmp_path / f"pack{next(made)}"
            folder.mkdir()
            result = job.run(folder, None, lambda *counts: None)
            found.append(Pack(folder, result["languages"], result["licences"]))
        return found

    return make


def repository(name: str, *numbers: int, size: int = 100, unit: str = "", **other) -> MemoryUnit:
    files = {f"f{number}.py": text(number, size) for number in numbers}
    return MemoryUnit(unit or name, ((name, files),), **other)


def choose(inventory: Inventory, limits: Limits | None = None, **arguments) -> Documents:
    defaults = {"weights": None, "held_out": (), "deduplicate": True, "seed": 0}
    return choose_documents(inventory, limits or Limits(), **{**defaults, **arguments})


def files_of(inventory: Inventory, documents: Documents) -> list[tuple[int, str, list[str]]]:
    """Source, name and paths of each document, in order."""
    borders = documents.borders()
    contents: list[Path] = [pack.content for pack in inventory.packs]
    found = []
    for row in range(len(documents)):
        rows = slice(borders[row], borders[row + 1])
        paths = read_paths(contents, {column: values[rows] for column, values in documents.files.items()})
        assert documents.sizes[row] == documents.files["size"][rows].sum()
        name = documents.names[documents.name[row]]
        found.append((int(documents.source[row]), name, [path.decode() for path in paths]))
    return found


def test_more_licences_than_16_bits_number(tmp_path):
    """Those of one pack fit, those of all packs together do not."""
    found, expected = [], []
    for number in range(3):
        folder = tmp_path / str(number)
        folder.mkdir()
        files = np.zeros(40_000, dtype=FILE)
        files["licence"] = np.arange(40_000)[::-1]
        files.tofile(folder / "files.bin")
        np.array([(0, 1, 0, (number, 0), 0)], dtype=REPOSITORY).tofile(folder / "repositories.bin")
        (folder / "names.bin").write_bytes(b"r")
        # Two thirds of them are common to all.
        own = [f"LicenseRef-{i if i % 3 else f'{number}-{i}'}" for i in range(40_000)]
        found.append(Pack(folder, ["Python"], own))
        expected += own[::-1]
    inventory = load_inventory(found)
    assert len(inventory.licences) > 1 << 16
    assert [inventory.licences[number] for number in inventory.files["licence"]] == expected
    assert inventory.files["language"].dtype == np.uint16


def test_pieces_of_one_name_and_source_are_one_document(packs):
    units = [
        (0, repository("a", 1, unit="a1")),
        (0, repository("b", 2)),
        (0, repository("a", 3, unit="a2")),
        (1, repository("a", 4)),
    ]
    inventory = load_inventory(packs(*units))
    assert sorted(files_of(inventory, choose(inventory))) == [
        (0, "a", ["f1.py", "f3.py"]),
        (0, "b", ["f2.py"]),
        (1, "a", ["f4.py"]),
    ]
    # Names are equal across sources, so that both documents land in one split.
    names = [inventory.names[number] for number in inventory.document_name]
    assert sorted(names) == ["a", "a", "b"]
    assert len(inventory.names) == 2


def test_how_units_are_packed_does_not_matter(packs):
    units = [(0, repository(f"r{i}", i, i + 1)) for i in range(12)]
    one, many = (load_inventory(packs(*units, pack_bytes=size)) for size in (1 << 30, 250))
    assert len(one.packs) == 1 < len(many.packs)
    assert files_of(one, choose(one)) == files_of(many, choose(many))


def test_one_of_each_content_stays(packs):
    units = [(0, repository(f"r{i}", i, 99)) for i in range(6)]
    inventory = load_inventory(packs(*units))
    documents = choose(inventory)
    assert documents.skipped == {"duplicate": 5}
    holders = set()
    for seed in range(4):
        documents = choose(inventory, seed=seed)
        (holder,) = (name for _, name, paths in files_of(inventory, documents) if "f99.py" in paths)
        assert holder == documents.names[documents.name[0]]  # the first in seeded order
        holders.add(holder)
    assert len(holders) > 1
    assert len(choose(inventory, deduplicate=False).files["size"]) == 12


def test_a_held_out_repository_keeps_its_content(packs):
    units = [(0, repository(f"r{i}", i, 99)) for i in range(6)]
    inventory = load_inventory(packs(*units))
    for name in ("r1", "r4"):
        documents = choose(inventory, held_out=[name])
        assert [n for _, n, paths in files_of(inventory, documents) if "f99.py" in paths] == [name]
        assert [documents.names[row] for row in np.flatnonzero(documents.held_out)] == [name]


def test_a_repository_of_duplicates_alone_is_no_document(packs):
    inventory = load_inventory(packs((0, repository("a", 1)), (1, repository("b", 1))))
    assert len(choose(inventory)) == 1


def test_huge_repositories_are_cut(packs):
    files = {f"d{i % 3}/f{i}.py": text(i, 100) for i in range(9)}
    inventory = load_inventory(packs((0, MemoryUnit("u", (("big", files), ("small", {"a.py": text(50, 10)}))))))
    documents = choose(inventory, Limits(max_document_bytes=350))
    found = files_of(inventory, documents)
    assert sorted(sorted(paths) for _, name, paths in found if name == "big") == [
        sorted(path for path in files if path.startswith(f"d{i}/")) for i in range(3)
    ]
    assert len(found) == 4


class TestWeights:
    @pytest.fixture
    def inventory(self, packs):
        units = [(i % 2, repository(f"r{i}", i, size=200 if i % 2 else 600)) for i in range(40)]
        return load_inventory(packs(*units, pack_bytes=5000))

    def bytes_of(self, documents: Documents) -> list[int]:
        return [int(documents.sizes[documents.source == number].sum()) for number in range(2)]

    def test_the_most_data_that_keeps_them(self, inventory):
        assert self.bytes_of(choose(inventory)) == [12000, 4000]
        documents = choose(inventory, weights=(0.5, 0.5))
        assert self.bytes_of(documents) == [3600, 4000]  # whole documents: 4000 does not fit another 600
        assert documents.dropped == {"source_weights": {"documents": 14, "bytes": 8400}}
        assert self.bytes_of(choose(inventory, weights=(3, 1))) == [12000, 4000]
        assert self.bytes_of(choose(inventory, weights=(1, 0))) == [12000, 0]

    def test_with_a_limit(self, inventory):
        assert self.bytes_of(choose(inventory, Limits(max_bytes=4800), weights=(3, 1))) == [3600, 1200]

    def test_held_out_documents_come_on_top(self, inventory):
        documents = choose(inventory, weights=(0.5, 0.5), held_out=["r2"])
        names = [documents.names[number] for number in documents.name]
        assert "r2" in names
        assert self.bytes_of(documents) == [4200, 4000]


def test_limits(packs):
    inventory = load_inventory(packs(*[(0, repository(f"r{i}", i, size=100 + i)) for i in range(20)]))
    documents = choose(inventory, Limits(max_documents=7))
    assert len(documents) == 7
    assert documents.dropped["limits"]["documents"] == 13
    everything = choose(inventory)
    names = [everything.names[number] for number in everything.name]
    assert [documents.names[number] for number in documents.name] == names[:7]
    documents = choose(inventory, Limits(max_bytes=1000))
    assert 1000 - 100 < documents.sizes.sum() <= 1000
    held_out = choose(inventory, Limits(max_documents=7), held_out=["r1?"])
    assert len(held_out) == 17


def test_revisions_by_source_and_name(packs):
    units = [
        (0, repository("a", 1, unit="1", revision="c0ffee")),
        (0, repository("a", 2, unit="2", revision="beef")),
        (1, repository("a", 3, revision="1.0")),
        (1, repository("b", 4)),
    ]
    assert revisions(packs(*units), 3) == [{"a": "c0ffee beef"}, {"a": "1.0"}, {}]


def test_languages_and_licences_are_numbered_across_packs(packs):
    units = [
        (0, MemoryUnit("1", (("a", {"x.py": b"x = 1\n"}),), licence="MIT")),
        (0, MemoryUnit("2", (("b", {"x.c": b"int x;\n", "y.py": b"y = 1\n"}),), licence="ISC")),
    ]
    inventory = load_inventory(packs(*units))
    assert [inventory.languages[number] for number in inventory.files["language"]] == ["python", "c", "python"]
    assert [inventory.licences[number] for number in inventory.files["licence"]] == ["MIT", "ISC", "ISC"]
