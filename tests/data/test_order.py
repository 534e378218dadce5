"""The order of blocks: every block once, chunk after chunk, the same at any position however one gets there."""

from itertools import pairwise

import numpy as np
import pytest

from muse_lightning.data.order import BlockOrder

COUNTS = [3, 0, 5, 1, 4]
STORED = [(chunk, block) for chunk, count in enumerate(COUNTS) for block in range(count)]


def read(order: BlockOrder) -> list[tuple[int, int]]:
    return [order[position] for position in range(len(order))]


@pytest.mark.parametrize("order", ["stored", "shuffled", "reshuffled"])
def test_every_block_once_and_chunks_stay_together(order):
    found = read(BlockOrder(COUNTS, order, seed=7, epoch=2))
    assert sorted(found) == STORED
    chunks = [chunk for chunk, _ in found]
    assert len([1 for a, b in pairwise(chunks) if a != b]) == 3
    assert (found == STORED) == (order == "stored")


def test_what_decides_the_order():
    def of(order, seed, epoch):
        return read(BlockOrder(COUNTS, order, seed, epoch))

    assert of("reshuffled", 1, 1) == of("reshuffled", 1, 1)
    assert of("reshuffled", 1, 1) != of("reshuffled", 1, 2)
    assert of("reshuffled", 1, 1) != of("reshuffled", 2, 1)
    assert of("shuffled", 1, 1) == of("shuffled", 1, 2)
    assert of("shuffled", 1, 1) != of("shuffled", 2, 1)


def test_positions_in_any_order():
    order = BlockOrder(COUNTS, "reshuffled", seed=7, epoch=1)
    expected = read(order)
    for position in np.random.permutation(len(expected)):
        assert order[position] == expected[position]


def test_the_next_chunk():
    order = BlockOrder([2, 2, 2, 2], "reshuffled", seed=3, epoch=1)
    chunks = [order[position][0] for position in range(0, 8, 2)]
    assert [order.chunk_after(chunk) for chunk in chunks] == [*chunks[1:], None]


def test_order_outlives_library_releases():
    """Drawn again by numpy's frozen generator."""
    for epoch in (1, 2):
        chunks = np.random.RandomState([5, epoch]).permutation(3)
        inside = [np.random.RandomState([5, epoch, chunk]).permutation(4).tolist() for chunk in chunks]
        expected = [(chunk, block) for chunk, blocks in zip(chunks, inside, strict=True) for block in blocks]
        assert read(BlockOrder([4, 4, 4], "reshuffled", 5, epoch)) == expected


def test_a_split_without_blocks():
    assert len(BlockOrder([], "reshuffled", 0, 1)) == 0
    assert len(BlockOrder([0, 0], "stored", 0, 1)) == 0
