"""Order, limits, splits and shards are functions of names, sizes and the seed."""

from itertools import pairwise

import numpy as np
import pytest

from muse_lightning.data.inventory import Texts
from muse_lightning.data.selection import (
    DROPPED,
    SPLITS,
    Limits,
    cut_by_folder,
    cut_shards,
    duplicates,
    is_held_out,
    keep_long_share,
    order_files,
    order_key,
    seeded_order,
    source_budgets,
    split_names,
    within,
)
from muse_lightning.errors import UserError

NAMES = [f"r{i}" for i in range(40)]
SIZES = np.array([(37 * i) % 50 + 1 for i in range(40)])
TRAIN, VAL, TEST = (SPLITS.index(name) for name in ("train", "val", "test"))


def ordered(names: list[str], seed: int) -> list[str]:
    return [names[row] for row in seeded_order([order_key(seed, name) for name in names])]


class TestOrder:
    def test_it_is_drawn_by_the_seed_and_not_by_the_listing(self):
        one = ordered(NAMES, 1)
        assert sorted(one) == sorted(NAMES)
        assert one == ordered(NAMES[::-1], 1) != ordered(NAMES, 2)
        # A repository that is added changes nothing for the others.
        assert [name for name in ordered([*NAMES, "new"], 1) if name != "new"] == one

    def test_it_is_the_same_on_every_machine(self):
        # printf "0\0r0" | b2sum -l 128, and so on, sorted.
        assert ordered(NAMES[:6], 0) == ["r4", "r2", "r0", "r3", "r1", "r5"]

    def test_ties(self):
        keys = [order_key(0, "a")] * 4
        assert seeded_order(keys, np.array([1, 0, 1, 0]), np.array([1, 3, 0, 2])).tolist() == [3, 1, 2, 0]


class TestFiles:
    PATHS = tuple(f"f{i}".encode() for i in range(20))

    def paths(self, order: str, paths: tuple[bytes, ...] = PATHS, name: str = "r", readme: bool = False, seed: int = 0):
        return [paths[row] for row in order_files(name, paths, order, readme, seed)]

    def test_shuffled_by_the_seed_or_sorted(self):
        assert self.paths("path", self.PATHS[::-1]) == sorted(self.PATHS)
        shuffled = self.paths("shuffle")
        assert sorted(shuffled) == sorted(self.PATHS) != shuffled
        assert shuffled != self.paths("shuffle", seed=1)
        # Two repositories with the same paths are not shuffled alike.
        assert shuffled != self.paths("shuffle", name="s")

    @pytest.mark.parametrize("order", ["path", "shuffle"])
    def test_the_topmost_readme_goes_first(self, order):
        paths = (b"a.py", b"doc/readme.rst", b"ReadMe.md", b"README.txt", b"readmes.py", b"z.py")
        first, *rest = self.paths(order, paths, readme=True)
        assert first == b"README.txt"  # of those in one folder, the first by its bytes
        without = self.paths(order, paths)
        assert rest == [path for path in without if path != first]
        assert self.paths(order, (b"b", b"a"), readme=True) == self.paths(order, (b"b", b"a"))


def test_the_first_of_equal_contents_by_rank_stays():
    digests = np.array([[1, 2], [1, 3], [1, 2], [2, 2], [1, 2], [2, 2]], dtype=np.uint64)
    ranks = np.array([5, 0, 1, 7, 1, 7])
    assert duplicates(digests, ranks).tolist() == [True, False, False, False, True, True]


class TestCut:
    def cut(self, max_bytes: int, sizes: dict[str, int]) -> list[list[str]]:
        paths = [path.encode() for path in sizes]
        parts = cut_by_folder(paths, list(sizes.values()), max_bytes)
        return [[paths[row].decode() for row in part] for part in parts]

    @pytest.mark.parametrize(
        ("max_bytes", "sizes", "expected"),
        [
            # Folders stay together although a and b would fit in one part file by file.
            (10, {"a/1": 3, "a/2": 3, "b/1": 3, "b/2": 3}, [["a/1", "a/2"], ["b/1", "b/2"]]),
            # Neighbours that fit are put together.
            (10, {"a/1": 4, "b/1": 4, "c/1": 4}, [["a/1", "b/1"], ["c/1"]]),
            # A folder that is too large is cut in turn.
            (4, {"a/x/1": 2, "a/x/2": 2, "a/y/1": 3, "z": 1}, [["a/x/1", "a/x/2"], ["a/y/1", "z"]]),
            # A file larger than the limit stands alone.
            (4, {"a": 1, "b": 9, "c": 1}, [["a"], ["b"], ["c"]]),
        ],
        ids=["folders", "neighbours", "nested", "large-file"],
    )
    def test_by_folder(self, max_bytes, sizes, expected):
        assert self.cut(max_bytes, sizes) == expected

    def test_every_file_once(self):
        sizes = {f"d{i % 3}/e{i % 5}/f{i}": 1 + i % 7 for i in range(60)}
        parts = self.cut(20, sizes)
        assert sorted(path for part in parts for path in part) == sorted(sizes)
        assert all(sum(sizes[path] for path in part) <= 20 for part in parts)


def test_within_takes_each_that_still_fits():
    sizes = np.array([5, 9, 3, 1, 1])
    assert within(sizes, 9).tolist() == [True, False, True, True, False]
    assert within(sizes, None, 2).tolist() == [True, True, False, False, False]
    assert within(sizes, 9, 2).tolist() == [True, False, True, False, False]


class TestWeights:
    def test_the_scarcest_source_decides(self):
        assert source_budgets(np.array([1000, 300]), [0.5, 0.5], None).astype(int).tolist() == [301, 301]
        assert source_budgets(np.array([1000, 300]), [3, 1], None).astype(int).tolist() == [901, 301]
        assert source_budgets(np.array([1000, 300, 7]), [1, 1, 0], 200).astype(int).tolist() == [101, 101, 1]

    def test_a_source_without_bytes(self):
        with pytest.raises(UserError, match=r"data.source_weights\[1\]: 0.2 found, but nothing is left of that source"):
            source_budgets(np.array([1000, 0]), [0.8, 0.2], None)


def test_held_out_names_and_patterns():
    names = Texts.of(["numpy", "numpy-doc", "org/a", "Org/b", "x"])
    assert is_held_out(names, ["numpy", "org/*"]).tolist() == [True, False, True, False, False]
    assert not is_held_out(names, []).any()


class TestSplits:
    def split(self, sizes: np.ndarray, fractions: dict[str, float], held_out: tuple[int, ...] = (), seed: int = 0):
        out = np.isin(np.arange(len(sizes)), held_out)
        return split_names(Texts.of(f"r{i}" for i in range(len(sizes))), sizes, out, fractions, seed)

    @pytest.mark.parametrize("fractions", [{"val": 0.1}, {"val": 0.1, "test": 0.2}, {"val": 0.0, "test": 0.3}, {}])
    def test_of_the_size_asked_for(self, fractions):
        split = self.split(SIZES, fractions)
        assert set(split) == {TRAIN, *(SPLITS.index(name) for name, fraction in fractions.items() if fraction)}
        rest = np.ones(len(SIZES), dtype=bool)
        for name in ("test", "val"):
            budget = fractions.get(name, 0) * SIZES.sum()
            if budget:
                own = split == SPLITS.index(name)
                rest &= ~own
                assert budget - 2 * SIZES[rest].min() < SIZES[own].sum() <= budget
                assert SIZES[own].max() <= budget / 2

    def test_the_seed_draws(self):
        assert self.split(SIZES, {"val": 0.3}).tolist() != self.split(SIZES, {"val": 0.3}, seed=1).tolist()

    def test_what_is_held_out_is_test_and_nothing_else_is(self):
        split = self.split(SIZES, {"val": 0.2, "test": 0.2}, held_out=(3, 5))
        assert np.flatnonzero(split == TEST).tolist() == [3, 5]
        assert VAL in split

    def test_held_out_names_that_have_no_bytes_are_no_test(self):
        split = self.split(np.array([0, 5, 5, 5]), {"test": 0.3}, held_out=(0,))
        assert split[0] == DROPPED
        assert (split == TEST).sum() == 1

    def test_never_empty_and_never_everything(self):
        assert sorted(self.split(np.array([100, 90, 80]), {"val": 0.01, "test": 0.01})) == [TRAIN, VAL, TEST]
        assert set(self.split(np.array([1, 1, 1]), {"val": 0.5, "test": 0.49})) == {TRAIN, VAL, TEST}

    @pytest.mark.parametrize(
        ("fractions", "held_out", "message"),
        [
            ({"val": 0.1, "test": 0.1}, (), r"2 repositories cannot be split into train and test and val; .*val_frac"),
            ({}, (0, 1), r"0 repositories cannot be split into train; .*hold out fewer in data.held_out"),
        ],
    )
    def test_too_few(self, fractions, held_out, message):
        with pytest.raises(UserError, match=message):
            self.split(np.array([1, 1]), fractions, held_out)


class TestLongShare:
    TOKENS = np.array([10, 100, 30, 5, 200, 60])

    @pytest.mark.parametrize("share", [0.8, 0.9, 0.99, 1.0])
    def test_it_is_reached_by_dropping_short_ones(self, share):
        kept = keep_long_share(self.TOKENS, 100, share)
        assert kept[[1, 4]].all()
        total = self.TOKENS[kept].sum()
        assert 300 / total >= share
        # None that was dropped would still fit.
        assert all(300 / (total + tokens) < share for tokens in self.TOKENS[~kept])

    def test_what_has_it_already_is_left_alone(self):
        assert keep_long_share(self.TOKENS, 100, 0.5).all()

    def test_no_long_document(self):
        with pytest.raises(UserError, match=r"data.long_document_share: 0.5 found, but no document .* 500 tokens"):
            keep_long_share(self.TOKENS, 500, 0.5)


def test_shards_are_contiguous_and_balanced():
    shards = cut_shards(SIZES, 200)
    assert shards[0] == 0
    assert set(np.diff(shards)) == {0, 1}
    sizes = np.bincount(shards, weights=SIZES)
    assert len(sizes) == round(SIZES.sum() / 200)
    assert all(abs(a - b) <= 100 for a, b in pairwise(sizes))
    assert not cut_shards(SIZES, 1 << 30).any()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, 0) for name in ("max_documents", "max_bytes", "max_document_bytes", "long_document_tokens")),
        ("min_document_tokens", -1),
        ("long_document_share", 0.0),
        ("long_document_share", 1.5),
    ],
)
def test_limits_are_checked(name, value):
    with pytest.raises(UserError, match=rf"data.{name}: {value} found"):
        Limits(**{name: value})
