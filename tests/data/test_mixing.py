"""The plan of a training: whole epochs, shares of datasets, positions that can be taken up again."""

from collections import Counter
from dataclasses import replace

import pytest

from muse_lightning.data.mixing import BlockId, Part, Plan, Position
from muse_lightning.data.order import BlockOrder
from muse_lightning.errors import UserError

CODE, SCIENCE = Part("code", "c0de", (7, 9, 4), 0.8), Part("science", "5c1e", (5, 6), 0.2)


def take(plan: Plan, batches: int, position: Position | None = None) -> tuple[list[BlockId], Position]:
    """As many global batches as wanted, over the ends of epochs."""
    position = plan.start() if position is None else position
    blocks = []
    for _ in range(batches):
        position = plan.begin(position)
        batch, position = plan.take(position)
        blocks += batch
    return blocks, position


def test_one_dataset_is_read_in_epochs_of_whole_batches():
    plan = Plan([CODE], seed=1, global_batch=3)
    assert plan.batches_left(plan.start()) == 6  # of 20 blocks
    blocks, position = take(plan, 12)
    for epoch in (1, 2):
        expected = BlockOrder(CODE.counts, "reshuffled", 1, epoch)
        assert [block[1:] for block in blocks[18 * (epoch - 1) : 18 * epoch]] == [
            (epoch, *expected[offset]) for offset in range(18)
        ]
    assert plan.batches_left(position) == 0
    assert plan.begin(position).epochs == (3,)
    assert [block for batch, _ in plan.epoch(plan.start()) for block in batch] == blocks[:18]


@pytest.mark.parametrize("weights", [(0.8, 0.2), (8, 2), (1, 1), (0.999, 0.001)])
def test_every_step_has_the_wanted_shares(weights):
    parts = [replace(part, weight=weight) for part, weight in zip((CODE, SCIENCE), weights, strict=True)]
    blocks, _ = take(Plan(parts, seed=3, global_batch=4), 500)
    seen: Counter[int] = Counter()
    for number, block in enumerate(blocks, start=1):
        seen[block.dataset] += 1
        for dataset in (0, 1):
            assert abs(seen[dataset] - number * weights[dataset] / sum(weights)) < 4
    assert seen[1] > 0


def test_a_dataset_that_is_used_up_starts_its_next_epoch():
    blocks, _ = take(Plan([CODE, SCIENCE], seed=3, global_batch=4), 100)
    for dataset, part in enumerate((CODE, SCIENCE)):
        of_one = [block for block in blocks if block.dataset == dataset]
        size = sum(part.counts)
        assert len(of_one) > 2 * size
        for epoch in range(1, len(of_one) // size + 1):
            order = BlockOrder(part.counts, "reshuffled", 3, epoch)
            found = of_one[(epoch - 1) * size : epoch * size]
            assert found == [(dataset, epoch, *order[offset]) for offset in range(size)]


def test_every_rank_gets_its_share_of_each():
    """Two ranks of two blocks each, and every fourth block of science: in a fixed turn one rank would get it all."""
    parts = [replace(CODE, weight=0.75), replace(SCIENCE, weight=0.25)]
    blocks, _ = take(Plan(parts, seed=3, global_batch=4), 1000)
    for place in range(4):
        assert 200 < sum(block.dataset for block in blocks[place::4]) < 300


def test_the_seed_decides():
    parts = [Part("a", "a", (50,)), Part("b", "b", (50,))]
    plans = [[block.dataset for block in take(Plan(parts, seed, 1), 20)[0]] for seed in range(8)]
    assert plans[0] == [block.dataset for block in take(Plan(parts, 0, 1), 20)[0]]
    assert any(plan != plans[0] for plan in plans)


@pytest.mark.parametrize("parts", [[CODE], [CODE, SCIENCE]])
@pytest.mark.parametrize("batches", [0, 1, 6, 7, 13, 40])
def test_a_state_is_taken_up_exactly(parts, batches):
    plan = Plan(parts, seed=3, global_batch=3)
    expected, _ = take(plan, batches + 20)
    _, position = take(plan, batches)
    again = Plan(parts, seed=3, global_batch=3)
    found, notes = again.from_state(plan.to_state(position))
    assert found == position
    assert notes == []
    assert take(again, 20, found)[0] == expected[3 * batches :]


@pytest.mark.parametrize("global_batch", [1, 2, 4, 5])
@pytest.mark.parametrize("parts", [[CODE], [CODE, SCIENCE]])
def test_another_global_batch_goes_on_with_the_next_block(parts, global_batch):
    plan = Plan(parts, seed=3, global_batch=3)
    first, position = take(plan, 4)
    sequence, _ = take(Plan(parts, seed=3, global_batch=1), 20)
    again = Plan(parts, seed=3, global_batch=global_batch)
    position, _ = again.from_state(plan.to_state(position))
    rest = [block for batch, _ in again.epoch(position) for block in batch]
    assert first == sequence[:12]
    assert rest[:8] == sequence[12 : 12 + len(rest[:8])]
    size = 20 if len(parts) == 1 else 31
    assert size - global_batch < len(first) + len(rest) <= size


def test_other_weights_count_from_there_on():
    plan = Plan([CODE, SCIENCE], seed=3, global_batch=5)
    first, position = take(plan, 20)
    other = [Part("code", "c0de", CODE.counts, 1), Part("moved", "5c1e", SCIENCE.counts, 3)]
    again = Plan(other, seed=3, global_batch=5)
    position, notes = again.from_state(plan.to_state(position))
    assert notes == [
        "data.mixture: weight of code is 1 from here on, it was 0.8",
        "data.mixture: weight of moved is 3 from here on, it was 0.2",
    ]
    rest, _ = take(again, 20, position)
    assert 24 <= Counter(block.dataset for block in rest)[0] <= 26
    # Each dataset goes on in its own sequence.
    for dataset, part in enumerate((CODE, SCIENCE)):
        of_one = [block[1:] for block in first + rest if block.dataset == dataset]
        epochs = [
            (epoch, *order[offset])
            for epoch in range(1, 12)
            for order in [BlockOrder(part.counts, "reshuffled", 3, epoch)]
            for offset in range(len(order))
        ]
        assert of_one == epochs[: len(of_one)]


def test_weight_0_keeps_the_place_of_a_dataset():
    plan = Plan([CODE, SCIENCE], seed=3, global_batch=5)
    _, before = take(plan, 3)
    without = Plan([CODE, Part("science", "5c1e", SCIENCE.counts, 0)], seed=3, global_batch=5)
    position, _ = without.from_state(plan.to_state(before))
    blocks, after = take(without, 10, position)
    assert {block.dataset for block in blocks} == {0}
    assert after.offsets[1] == before.offsets[1]


def test_a_new_dataset_starts_and_a_missing_one_is_refused():
    one = Plan([CODE], seed=3, global_batch=2)
    _, position = take(one, 4)
    both = Plan([SCIENCE, CODE], seed=3, global_batch=2)
    found, notes = both.from_state(one.to_state(position))
    assert (found.epochs, found.offsets) == ((1, 1), (0, 8))
    assert "data.mixture: science is new and starts at its first block" in notes
    with pytest.raises(UserError, match=r"data.mixture: science, which the checkpoint has read from, is not among"):
        one.from_state(both.to_state(found))


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (Plan([CODE], 4, 2), "data.seed: 4 found, but the checkpoint's data state was saved with 3"),
        (Plan([SCIENCE], 3, 2), r"data.dataset \(fingerprint\): 5c1e found, but .* saved with c0de"),
    ],
)
def test_other_data_is_refused(plan, message):
    saved = Plan([CODE], 3, 2)
    with pytest.raises(UserError, match=message):
        plan.from_state(saved.to_state(saved.start()))
