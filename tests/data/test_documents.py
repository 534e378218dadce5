"""Cutting a huge repository by folder."""

from dataclasses import dataclass

import pytest

from muse_lightning.data.documents import Document, SourceFile, cut_by_folder, listing_digest


@dataclass(frozen=True)
class Named(SourceFile):
    def read(self) -> bytes:
        return b"x" * self.size


def document(**sizes: int) -> Document:
    return Document(
        "repo", tuple(Named(path.replace("__", "/"), size, "") for path, size in sizes.items()), skipped={"symlink": 2}
    )


def cut(max_bytes: int, **sizes: int) -> list[list[str]]:
    return [[file.path for file in part.files] for part in cut_by_folder(document(**sizes), max_bytes)]


def test_a_repository_that_fits_is_left_alone():
    whole = document(a=1, b__c=2)
    assert cut_by_folder(whole, 3) == [whole]


@pytest.mark.parametrize(
    ("max_bytes", "sizes", "expected"),
    [
        # Folders stay together although a and b would fit in one part file by file.
        (10, {"a__1": 3, "a__2": 3, "b__1": 3, "b__2": 3}, [["a/1", "a/2"], ["b/1", "b/2"]]),
        # Neighbours that fit are put together.
        (10, {"a__1": 4, "b__1": 4, "c__1": 4}, [["a/1", "b/1"], ["c/1"]]),
        # A folder that is too large is cut in turn.
        (4, {"a__x__1": 2, "a__x__2": 2, "a__y__1": 3, "z": 1}, [["a/x/1", "a/x/2"], ["a/y/1", "z"]]),
        # A file larger than the limit stands alone.
        (4, {"a": 1, "b": 9, "c": 1}, [["a"], ["b"], ["c"]]),
    ],
    ids=["folders", "neighbours", "nested", "large-file"],
)
def test_cut(max_bytes, sizes, expected):
    assert cut(max_bytes, **sizes) == expected


def test_parts_hold_every_file_once_and_the_name():
    sizes = {f"d{i % 3}__e{i % 5}__f{i}": 1 + i % 7 for i in range(60)}
    parts = cut_by_folder(document(**sizes), 20)
    paths = [file.path for part in parts for file in part.files]
    assert sorted(paths) == sorted(path.replace("__", "/") for path in sizes)
    assert all(part.size <= 20 for part in parts)
    assert {part.name for part in parts} == {"repo"}
    assert len({part.part for part in parts}) == len(parts)
    assert sum(part.skipped.get("symlink", 0) for part in parts) == 2


def test_digest_of_a_listing_holds_every_part_of_it():
    def digest(name: str = "r", path: str = "a", size: int = 1, stamp: str = "s", count: int = 1) -> str:
        return listing_digest([Document(name, (Named(path, size, stamp),))] * count)

    changes = [{}, {"name": "q"}, {"path": "b"}, {"size": 2}, {"stamp": "t"}, {"count": 2}]
    assert len({digest(**change) for change in changes}) == len(changes)
    # What belongs to one name cannot move to the next one unnoticed.
    assert digest(name="r", path="ab") != digest(name="ra", path="b")
