"""Costs: pairs against a count, times with instruments that only run."""

import itertools
from collections.abc import Mapping
from dataclasses import replace

import pytest

from muse_lightning.attention import Dense
from muse_lightning.attention.partly_exact import PartlyExact
from muse_lightning.compare import costs
from muse_lightning.compare.activations import middle_layer
from muse_lightning.compare.blocks import Blocks
from muse_lightning.compare.settings import Grid, Setting, make_settings
from muse_lightning.measure.bench.timing import Run, Timing
from muse_lightning.model import Llama
from tests.compare.conftest import KV_HEADS, LAYERS, MUSE, SEQ_LEN


class Runs:
    """Instruments that run everything once and count."""

    device = "cpu"

    def __init__(self) -> None:
        self.results: dict[str, object] = {}

    def time(self, runs: Mapping[str, Run]) -> dict[str, Timing]:
        self.results = {name: run() for name, run in runs.items()}
        return {name: Timing.of([float(i)]) for i, name in enumerate(runs)}

    def peak_bytes(self, run: Run) -> int:
        raise NotImplementedError

    def kernel_times(self, run: Run) -> dict[str, float]:
        raise NotImplementedError


def test_pairs_of_the_documents(blocks: Blocks, settings: list[Setting]) -> None:
    expected = 0
    for batch in blocks.batches:
        ends = batch["cu_seqlens"].tolist() if "cu_seqlens" in batch else [0, SEQ_LEN]
        expected += sum((b - a) * (b - a + 1) // 2 for a, b in itertools.pairwise(ends))
    assert costs.pairs(settings[0], blocks.batches, LAYERS) == expected * LAYERS
    assert costs.pairs(settings[3], blocks.batches, LAYERS) < expected * LAYERS


@pytest.mark.parametrize("blocks", [True, False], indirect=True, ids=["documents", "rows"])
def test_every_setting_is_timed(llama: Llama, blocks: Blocks, settings: list[Setting]) -> None:
    names = {setting.name for setting in settings}
    found = middle_layer(llama, blocks.batches[0])
    runs = Runs()
    assert costs.attention_times(settings, found, runs, LAYERS).keys() == names
    gradients = [[x.shape for x in result] for result in runs.results.values()]
    assert gradients == [[found.q.shape, found.k.shape, found.v.shape]] * len(names)
    assert costs.forward_times(llama, settings, blocks.batches[0], Runs()).keys() == names
    assert type(llama.blocks[0].self_attn.attention).__name__ == "Dense"


def test_exact_layers_cost_what_exact_attention_costs(llama: Llama, blocks: Blocks) -> None:
    grid = Grid(chunk=(16,), query_cluster=(8,), key_cluster=(4,), top_k=(MUSE.top_k,), exact_layers=((), (-1,)))
    settings = make_settings(MUSE, 12, None, grid, LAYERS, KV_HEADS)
    settings.append(replace(settings[-1], name="all", attention=Dense, exact_layers=(0, 1)))
    dense, muse, half, all_exact = (settings[i] for i in (0, 1, 4, 5))
    pairs = [costs.pairs(each, blocks.batches, LAYERS) for each in (dense, muse, half, all_exact)]
    assert pairs[3] == pairs[0] > pairs[2] == pytest.approx((pairs[0] + pairs[1]) / 2)
    # `Runs` says that the first takes 0 ms, the fifth 4 and the sixth 5, of a layer that is not exact.
    times = costs.attention_times(settings, middle_layer(llama, blocks.batches[0]), Runs(), LAYERS)
    assert [times[each.name] for each in (dense, muse, half, all_exact)] == [0.0, 1.0, 2.0, 0.0]


def test_exact_heads_cost_what_exact_attention_of_them_costs(llama: Llama, blocks: Blocks) -> None:
    grid = Grid(chunk=(16,), query_cluster=(8,), key_cluster=(4,), top_k=(3,), exact_heads=(0, 3))
    three = replace(
        make_settings(MUSE, 12, None, grid, 3, KV_HEADS)[-1], heads={0: (), 1: (0, 1), 2: (1,)}, name="three"
    )
    dense, muse = make_settings(MUSE, 12, None, grid, 3, KV_HEADS)[::4]
    strategies = [PartlyExact(muse.attention(i), Dense(i), KV_HEADS, heads) for i, heads in three.heads.items()]
    with_heads = replace(three, attention=strategies.__getitem__, elsewhere=muse.attention)
    pairs = [costs.pairs(each, blocks.batches, 3) for each in (dense, muse, with_heads)]
    assert pairs[2] == pytest.approx((pairs[0] + pairs[1]) / 2)
    # `Runs` says that the first takes 0 ms, and the next ones one more each: a layer of MuSe, then without and with one
    # exact head. A layer of which both are exact takes what exact attention does.
    runs = Runs()
    times = costs.attention_times([dense, muse, with_heads], middle_layer(llama, blocks.batches[0]), runs, 3)
    assert times == {dense.name: 0.0, muse.name: 1.0, "three": pytest.approx((2 + 0 + 3) / 3)}
    # The gradient of each kind of layer is its own: q's of the first heads that of exact attention, or of MuSe.
    exact, approximate, none, one = (grads[0].unflatten(1, (KV_HEADS, -1)) for grads in runs.results.values())
    assert none.equal(approximate)
    assert one[:, 0].equal(exact[:, 0])
    assert one[:, 1].equal(approximate[:, 1])
    assert not exact[:, 1].allclose(approximate[:, 1])


def test_packed_documents_have_their_own_limit(blocks: Blocks) -> None:
    """Without documents MuSe is exact up to 7 chunks, with them up to 2."""
    dense, muse = make_settings(replace(MUSE, exact_below=None), 12, None, None, LAYERS, KV_HEADS)[:2]
    is_packed = "cu_seqlens" in blocks.batches[0]
    is_exact = costs.pairs(muse, blocks.batches, LAYERS) == costs.pairs(dense, blocks.batches, LAYERS)
    assert is_exact == (not is_packed)
