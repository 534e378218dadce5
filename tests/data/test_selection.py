"""Order, limits, splits and shards are functions of names, sizes and the seed."""

from itertools import pairwise

import pytest

from muse_lightning.data.documents import Document
from muse_lightning.data.filters import Filters
from muse_lightning.data.selection import Limits, choose_documents, cut_shards, order_files, split_documents
from muse_lightning.data.sources.local import LocalFile
from muse_lightning.errors import UserError


def make(sizes: list[int]) -> list[Document]:
    return [Document(f"r{i}", (LocalFile("f", size, "", ""),)) for i, size in enumerate(sizes)]


def names(documents: list[Document]) -> list[str]:
    return [document.name for document in documents]


DOCUMENTS = make([(7 * i) % 50 + 1 for i in range(40)])


def test_order_is_drawn_by_the_seed_and_not_by_the_listing():
    one = names(choose_documents(DOCUMENTS, Limits(), Filters(), 1))
    assert sorted(one) == sorted(names(DOCUMENTS))
    assert one == names(choose_documents(DOCUMENTS[::-1], Limits(), Filters(), 1))
    assert one != names(choose_documents(DOCUMENTS, Limits(), Filters(), 2))
    # A repository that is added changes nothing for the others.
    more = names(choose_documents([*DOCUMENTS, *[Document("new", ())]], Limits(), Filters(), 1))
    assert [name for name in more if name != "new"] == one


def test_the_order_is_the_same_on_every_machine():
    # printf "0\0r1\0" | b2sum -l 128, and so on, sorted.
    assert names(choose_documents(make([1] * 6), Limits(), Filters(), 0)) == ["r1", "r5", "r4", "r0", "r3", "r2"]


def test_limits():
    assert len(choose_documents(DOCUMENTS, Limits(max_documents=7), Filters(), 0)) == 7
    chosen = choose_documents(DOCUMENTS, Limits(max_bytes=300), Filters(), 0)
    total = sum(document.size for document in chosen)
    rest = [document for document in DOCUMENTS if document not in chosen]
    assert 300 - min(document.size for document in rest) < total <= 300
    parts = choose_documents(
        [Document("r", tuple(LocalFile(f"d{i}/f", 5, "", "") for i in range(9)))],
        Limits(max_document_bytes=10),
        Filters(),
        0,
    )
    assert sorted(part.size for part in parts) == [5, 10, 10, 10, 10]


def test_files_rejected_by_name_or_size_count_for_no_limit():
    document = Document("r", (LocalFile("big", 1000, "", ""), LocalFile("f", 10, "", "")), skipped={"symlink": 1})
    (chosen,) = choose_documents([document], Limits(max_bytes=10), Filters(max_file_bytes=100), 0)
    assert [file.path for file in chosen.files] == ["f"]
    assert chosen.skipped == {"symlink": 1, "oversize": 1}


@pytest.mark.parametrize("name", ["max_documents", "max_bytes", "max_document_bytes"])
def test_limits_are_positive(name):
    with pytest.raises(UserError, match=rf"data.{name}: 0 found"):
        Limits(**{name: 0})


def test_files_are_shuffled_by_the_seed_or_sorted():
    document = Document("r", tuple(LocalFile(f"f{i}", 1, "", "") for i in range(20)))
    by_path = [file.path for file in order_files(document, "path", 0)]
    assert by_path == sorted(by_path)
    shuffled = [file.path for file in order_files(document, "shuffle", 0)]
    assert sorted(shuffled) == by_path != shuffled
    assert shuffled != [file.path for file in order_files(document, "shuffle", 1)]
    # Two repositories with the same paths are not shuffled alike.
    assert shuffled != [file.path for file in order_files(Document("s", document.files), "shuffle", 0)]


@pytest.mark.parametrize("fractions", [{"val": 0.1}, {"val": 0.1, "test": 0.2}, {"val": 0.0, "test": 0.3}, {}])
def test_splits_are_disjoint_and_of_the_size_asked_for(fractions):
    splits = split_documents(DOCUMENTS, fractions, 0)
    assert set(splits) == {"train", *(name for name, fraction in fractions.items() if fraction)}
    assert sorted(name for split in splits.values() for name in names(split)) == sorted(names(DOCUMENTS))
    total = sum(document.size for document in DOCUMENTS)
    rest = list(DOCUMENTS)
    for name in ("test", "val"):
        budget = fractions.get(name, 0) * total
        if budget:
            rest = [document for document in rest if document not in splits[name]]
            sizes = [document.size for document in splits[name]]
            assert budget - 2 * min(document.size for document in rest) < sum(sizes) <= budget
            assert max(sizes) <= budget / 2


def test_parts_of_a_repository_stay_in_one_split():
    parts = [Document(f"r{i % 5}", (LocalFile("f", 10, "", ""),), part=f"p{i}") for i in range(40)]
    splits = split_documents(parts, {"val": 0.3, "test": 0.2}, 0)
    of_split = {split: set(names(documents)) for split, documents in splits.items()}
    assert not of_split["train"] & of_split["val"]
    assert not of_split["train"] & of_split["test"]
    assert not of_split["val"] & of_split["test"]


def test_a_split_is_never_empty_and_never_everything():
    splits = split_documents(make([100, 90, 80]), {"val": 0.01, "test": 0.01}, 0)
    assert {split: len(documents) for split, documents in splits.items()} == {"train": 1, "val": 1, "test": 1}
    splits = split_documents(make([1, 1, 1]), {"val": 0.5, "test": 0.49}, 0)
    assert set(splits) == {"train", "val", "test"}


def test_too_few_repositories_for_the_splits():
    with pytest.raises(
        UserError, match=r"2 repositories cannot be split into train and test and val; .*val_fraction to 0"
    ):
        split_documents(make([1, 1]), {"val": 0.1, "test": 0.1}, 0)


def test_shards_are_contiguous_and_balanced():
    shards = cut_shards(DOCUMENTS, 200)
    assert [document for shard in shards for document in shard] == DOCUMENTS
    sizes = [sum(document.size for document in shard) for shard in shards]
    assert len(shards) == round(sum(sizes) / 200)
    assert all(abs(a - b) <= 100 for a, b in pairwise(sizes))
    assert cut_shards(DOCUMENTS, 1 << 30) == [DOCUMENTS]
