"""A whole preparation: what the card says, several workers, kills, a full disk, two processes at once."""

import multiprocessing
import os
import sys
import time
from contextlib import suppress
from dataclasses import replace
from itertools import pairwise
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import numpy as np
import pytest

from muse_lightning.data import assembly, building
from muse_lightning.data.building import Preparation
from muse_lightning.data.card import DatasetCard, read_card
from muse_lightning.data.filters import Filters
from muse_lightning.data.prepare import prepare_dataset
from muse_lightning.data.selection import Limits
from muse_lightning.data.tokenizer import ByteTokenizer
from muse_lightning.errors import UserError
from tests.data.memory_source import MemorySource, MemoryUnit, contents, text


def how(limits: Limits | None = None, **arguments) -> Preparation:
    defaults = {
        "filters": Filters(),
        "fractions": {"val": 0.2},
        "file_order": "path",
        "seed": 0,
        "chunk_bytes": 4000,
        "num_workers": 1,
    }
    return Preparation(limits=limits or Limits(), **{**defaults, **arguments})


def prepare(dataset: Path, *sources: MemorySource, preparation: Preparation | None = None) -> DatasetCard:
    return prepare_dataset(dataset, sources, ByteTokenizer(), "bytes", preparation or how())


def documents_of(dataset: Path, split: str) -> list[str]:
    """Every document of a split, as text."""
    found = []
    for chunk in read_card(dataset).splits[split].chunks:
        data = (dataset / split / chunk.filename).read_bytes()
        offsets = np.frombuffer(data, dtype="<u4", offset=4, count=int.from_bytes(data[:4], "little") + 1)
        found += [ByteTokenizer().decode(np.frombuffer(data[a:b], dtype="<u2")) for a, b in pairwise(offsets)]
    return found


def names_of(dataset: Path, split: str) -> list[str]:
    return [document.removeprefix("<|repo_name|>").partition("\n")[0] for document in documents_of(dataset, split)]


@pytest.fixture
def small_stages(monkeypatch):
    make_stages_small(monkeypatch)


def make_stages_small(patch: pytest.MonkeyPatch) -> None:
    """Packs and jobs of a few files, so that little data has many of them."""
    patch.setattr(building, "_PACK_BYTES", 1000)
    patch.setattr("muse_lightning.data.encoding._JOB_BYTES", 1500)


REPOSITORIES = {f"r{i}": {f"f{j}.py": text(10 * i + j, 100 + 30 * i) for j in range(3)} for i in range(20)}


@pytest.mark.usefixtures("small_stages")
class TestContent:
    def test_the_card_counts_what_is_there(self, tmp_path):
        first = MemorySource(
            [
                MemoryUnit("a", (("a", {"x.py": text(1, 200), "same.py": text(9, 50)}),), licence="MIT", revision="v1"),
                MemoryUnit("b", (("b", {"y.c": text(2, 300), "n": b"\0"}),), skipped={"symlink": 3}),
                MemoryUnit("bad", (("c", {"z.py": text(3, 400)}),), damaged="no end"),
            ],
            "first",
        )
        second = MemorySource([MemoryUnit("d", (("d", {"s.py": text(9, 50), "t.py": text(4, 150)}),))], "second")
        card = prepare(tmp_path / "set", first, second, preparation=how(fractions={}))
        assert card.sources == [
            {
                "identity": {"class": "MemorySource", "name": "first"},
                "units": 3,
                "documents": 2,
                "files": 3,
                "bytes": 550,
                "revisions": {"a": "v1"},
                "damaged": {"bad": "no end"},
            },
            {
                "identity": {"class": "MemorySource", "name": "second"},
                "units": 1,
                "documents": 1,
                "files": 1,
                "bytes": 150,
                "revisions": {},
                "damaged": {},
            },
        ]
        assert card.skipped_files == {"binary": 1, "duplicate": 1, "symlink": 3}
        assert card.languages == {"python": {"files": 3, "bytes": 400}, "c": {"files": 1, "bytes": 300}}
        assert card.licences == {"unknown": {"files": 2, "bytes": 450}, "MIT": {"files": 2, "bytes": 250}}
        assert card.files == 4
        assert card.format_version == 2
        assert card.inputs["filters"]["max_file_bytes"] == 1_000_000

    def test_damage_is_told_once(self, tmp_path, capsys):
        files = (("c", {"z.py": text(3, 400)}),)
        units = [
            MemoryUnit("r", files, damaged="tar: no end"),
            MemoryUnit(os.fsdecode(b"/place/\xe9.tar"), files, damaged="is damaged: no end"),
            *(MemoryUnit(f"r{i}", ((f"r{i}", {"x.py": text(i, 300)}),)) for i in range(4)),
        ]
        prepare(tmp_path / "set", MemorySource(units))
        told = [line for line in capsys.readouterr().err.splitlines() if "damaged" in line]
        assert told == [
            "data: left out, damaged: /place/\ufffd.tar: is damaged: no end",
            "data: left out, damaged: r: tar: no end",
        ]

    def test_damage_can_be_an_error(self, tmp_path):
        source = MemorySource([MemoryUnit("bad", (("c", {"z.py": text(3, 400)}),), damaged="no end")])
        with pytest.raises(UserError, match=r"bad: no end; repair or remove it, or set data.skip_damaged to true"):
            prepare(tmp_path / "set", source, preparation=how(skip_damaged=False))

    def test_held_out_repositories_are_test(self, tmp_path, capsys):
        source = MemorySource(REPOSITORIES)
        prepare(tmp_path / "set", source, preparation=how(held_out=("r1?", "r7", "none*")))
        assert sorted(names_of(tmp_path / "set", "test")) == sorted(["r7", *(f"r1{i}" for i in range(10))])
        assert "'none*' matches no repository that was read" in capsys.readouterr().err

    def test_the_readme_goes_first(self, tmp_path):
        source = MemorySource({"r": {"A.py": b"x = 1\n", "README.md": b"# r\n", "z.py": b"y = 1\n"}})
        prepare(tmp_path / "set", source, preparation=how(fractions={}, readme_first=True))
        (document,) = documents_of(tmp_path / "set", "train")
        assert document.startswith("<|repo_name|>r\n<|file_sep|>README.md\n# r\n<|file_sep|>A.py\n")

    def test_short_documents_are_dropped(self, tmp_path):
        source = MemorySource(REPOSITORIES)
        card = prepare(tmp_path / "set", source, preparation=how(Limits(min_document_tokens=1000)))
        lengths = [len(d.encode()) for split in card.splits for d in documents_of(tmp_path / "set", split)]
        assert min(lengths) >= 1000
        assert card.dropped_documents["min_document_tokens"]["documents"] == 20 - len(lengths) > 3
        with pytest.raises(UserError, match=r"data.min_document_tokens: 99999 found, but the longest document has 2"):
            prepare(tmp_path / "other", source, preparation=how(Limits(min_document_tokens=99999)))

    @pytest.mark.parametrize("share", [0.7, 0.95])
    def test_long_documents_have_their_share_of_train(self, tmp_path, share):
        source = MemorySource(REPOSITORIES)
        plain = prepare(tmp_path / "plain", source)
        limits = Limits(long_document_tokens=1500, long_document_share=share)
        card = prepare(tmp_path / "set", source, preparation=how(limits))

        def long_share(dataset: str) -> float:
            folder = tmp_path / dataset / "train"
            sizes = [
                np.fromfile(folder / c.filename, "<u4") for c in read_card(tmp_path / dataset).splits["train"].chunks
            ]
            lengths = np.concatenate([np.diff(size[1 : size[0] + 2].astype(int)) // 2 for size in sizes])
            return lengths[lengths >= 1500].sum() / lengths.sum()

        assert long_share("plain") < 0.7
        assert share <= long_share("set") < share + 0.2
        assert card.dropped_documents["long_document_share"]["documents"] > 0
        assert card.splits["val"] == plain.splits["val"]

    @pytest.mark.parametrize("weights", [(1.0,), (1.0, 2.0, 3.0)])
    def test_a_weight_for_each_source(self, tmp_path, weights):
        sources = [MemorySource({"a": {"x.py": b"x = 1\n"}}), MemorySource({"b": {"y.py": b"y = 1\n"}}, "other")]
        with pytest.raises(
            UserError, match=rf"source_weights: {len(weights)} found; one for each of the 2 data.sources"
        ):
            prepare(tmp_path / "set", *sources, preparation=how(source_weights=weights))

    def test_weights_decide_bytes(self, tmp_path):
        sources = [
            MemorySource({f"a{i}": {"x.py": text(i, 500)} for i in range(20)}, "a"),
            MemorySource({f"b{i}": {"x.py": text(100 + i, 500)} for i in range(5)}, "b"),
        ]
        card = prepare(tmp_path / "set", *sources, preparation=how(source_weights=(0.6, 0.4)))
        assert [source["bytes"] for source in card.sources] == [3500, 2500]
        limited = how(Limits(max_bytes=2500), source_weights=(0.6, 0.4))
        card = prepare(tmp_path / "limited", *sources, preparation=limited)
        assert [source["bytes"] for source in card.sources] == [1500, 1000]


@pytest.mark.usefixtures("small_stages")
class TestReading:
    """How much is read where a limit is set."""

    def units_read(self, dataset: Path, sizes: list[int], limits: Limits) -> int:
        source = MemorySource({f"r{i}": {"f.py": text(i, size)} for i, size in enumerate(sizes)})
        return prepare(dataset, source, preparation=how(limits, fractions={})).sources[0]["units"]

    def test_it_stops_when_there_is_enough(self, tmp_path, monkeypatch):
        monkeypatch.setattr(building, "_SMALLEST_PACK_BYTES", 100)
        assert self.units_read(tmp_path / "documents", [100] * 20, Limits(max_documents=4)) == 4
        assert self.units_read(tmp_path / "bytes", [100] * 20, Limits(max_bytes=810)) == 8
        # 90 % is there, and more will not fit.
        assert self.units_read(tmp_path / "more", [100] * 20, Limits(max_bytes=190)) == 8
        assert self.units_read(tmp_path / "all", [100] * 20, Limits()) == 20

    def test_it_goes_on_where_repositories_are_too_large(self, tmp_path, monkeypatch):
        monkeypatch.setattr(building, "_SMALLEST_PACK_BYTES", 100)
        assert self.units_read(tmp_path / "set", [5000] * 19 + [100], Limits(max_bytes=100)) > 1
        assert names_of(tmp_path / "set", "train") == ["r19"]


@pytest.mark.multi_process
@pytest.mark.usefixtures("small_stages")
def test_the_same_bytes_on_any_number_of_workers(tmp_path):
    source = MemorySource(REPOSITORIES)
    for workers in (1, 2, 4):
        limits = Limits(max_bytes=12_000, max_document_bytes=1000)
        prepare(tmp_path / f"set{workers}", source, preparation=how(limits, num_workers=workers))
    one = contents(tmp_path / "set1")
    assert len(one) > 6
    assert one == contents(tmp_path / "set2") == contents(tmp_path / "set4")


def start(tmp_path: Path, name: str, workers: int) -> ForkServerProcess:
    """Prepare in a process of its own that writes to a file. A fork of one without threads, which has imported
    everything once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    process = context.Process(target=prepare_alone, args=(tmp_path, name, workers))
    process.start()
    return process


def prepare_alone(tmp_path: Path, name: str, workers: int) -> None:
    with pytest.MonkeyPatch.context() as patch, (tmp_path / f"{name}.log").open("w") as sys.stderr:
        make_stages_small(patch)
        prepare(tmp_path / "set", MemorySource(REPOSITORIES), preparation=how(num_workers=workers))


def finished_jobs(tmp_path: Path) -> dict[str, int]:
    """Folder and inode of every finished pack, part and shard."""
    found = {}
    # Folders go away meanwhile; Path.rglob fails where one does.
    for folder, _, names in os.walk(tmp_path / ".set.staging"):
        if "result.json" in names and ".partial-" not in folder:
            with suppress(FileNotFoundError):
                found[folder] = os.stat(folder).st_ino
    return found


@pytest.mark.multi_process
@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.usefixtures("small_stages")
def test_what_was_finished_before_a_kill_is_not_done_again(tmp_path, workers, capsys):
    """Killed again and again, at whatever moment sixteen more jobs are finished, until it gets through."""
    reference = tmp_path / "reference"
    prepare(reference, MemorySource(REPOSITORIES))
    kept: dict[str, int] = {}
    kills = 0
    while True:
        process = start(tmp_path, "log", workers)
        before = len(kept)
        try:
            while process.is_alive() and len(finished_jobs(tmp_path)) < before + 16:
                time.sleep(0.002)
        finally:
            process.kill()
            process.join()
        assert "Traceback" not in (tmp_path / "log.log").read_text()
        if (tmp_path / "set").exists():
            break
        kills += 1
        now = finished_jobs(tmp_path)
        # Each folder that was there is still the same one.
        assert {path: now.get(path) for path in kept} == kept
        kept = now
        assert kills < 10
    assert kills >= 2
    assert contents(tmp_path / "set") == contents(reference)


@pytest.mark.usefixtures("small_stages")
def test_a_second_call_says_what_was_finished(tmp_path, monkeypatch, capsys):
    source = MemorySource(REPOSITORIES)
    monkeypatch.setattr(building, "_write", interrupt)
    with pytest.raises(KeyboardInterrupt):
        prepare(tmp_path / "set", source)
    monkeypatch.undo()
    make_stages_small(monkeypatch)
    capsys.readouterr()
    prepare(tmp_path / "set", source)
    lines = capsys.readouterr().err
    assert "data: 15 of 15 packs were finished before\n" in lines
    assert "data: 17 of 17 parts of ids were finished before\n" in lines
    assert not (tmp_path / ".set.staging").exists()


def test_what_was_read_is_kept_where_only_the_limits_left_nothing(tmp_path, capsys):
    source = MemorySource(REPOSITORIES)
    with pytest.raises(UserError, match=r"nothing is left of 20 listed repositories"):
        prepare(tmp_path / "set", source, preparation=how(Limits(max_bytes=10)))
    prepare(tmp_path / "set", source, preparation=how(Limits(max_bytes=10**6)))
    assert "data: 1 of 1 packs were finished before\n" in capsys.readouterr().err


def test_sources_of_which_nothing_can_be_read(tmp_path):
    unit = MemoryUnit("u", (("r", {}),), damaged="cut off")
    with pytest.raises(UserError) as error:
        prepare(tmp_path / "set", MemorySource([unit, replace(unit, name="v")]))
    assert str(error.value) == (
        "no repository was found in 2 listed units, 2 of them damaged; the first: u: cut off; repair them or give "
        "other sources"
    )
    assert not list(tmp_path.iterdir())


def interrupt(*arguments: object) -> None:
    raise KeyboardInterrupt


def test_what_the_disk_gives_back_is_compared_with_the_card(tmp_path, monkeypatch):
    source = MemorySource(REPOSITORIES)

    def place_damaged(chunk: Path, folder: Path) -> None:
        content = bytearray(chunk.read_bytes())
        content[-1] ^= 1
        (folder / chunk.name).write_bytes(content)

    monkeypatch.setattr(assembly, "_place", place_damaged)
    with pytest.raises(
        UserError, match=r"data chunk .*chunk-0-0.bin: the disk gives back other bytes than were written"
    ):
        prepare(tmp_path / "set", source)
    assert not (tmp_path / "set").exists()
    monkeypatch.undo()
    prepare(tmp_path / "set", source)


@pytest.mark.usefixtures("small_stages")
@pytest.mark.parametrize(("size", "reached"), [(900, set()), (2500, {"packs", "ids"}), (4500, {"packs", "ids"})])
@pytest.mark.parametrize("is_rebuilt", [True, False])
def test_a_full_disk_leaves_what_was_there(tmp_path, longest_file, size, reached, is_rebuilt):
    source = MemorySource(REPOSITORIES)
    if is_rebuilt:
        prepare(tmp_path / "set", source, preparation=how(seed=1))
    before = contents(tmp_path / "set")
    longest_file(size)
    with pytest.raises(
        UserError, match=r"data.dataset: no space is left beside .*set \(File too large\); make room"
    ) as error:
        prepare(tmp_path / "set", source)
    assert "\n" not in str(error.value)
    assert contents(tmp_path / "set") == before
    assert {Path(folder).relative_to(tmp_path).parts[1] for folder in finished_jobs(tmp_path)} == reached
    longest_file(1 << 30)
    prepare(tmp_path / "set", source)
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


@pytest.mark.multi_process
@pytest.mark.usefixtures("small_stages")
def test_two_processes_at_once(tmp_path):
    names = ["first", "second"]
    both = [start(tmp_path, name, 1) for name in names]
    try:
        for process in both:
            process.join(60)
        assert [process.exitcode for process in both] == [0, 0]
    finally:
        for process in both:
            process.kill()
    # One of them built it, the other found it.
    assert sorted((tmp_path / f"{name}.log").read_text().count("data: documents:") for name in names) == [0, 1]
