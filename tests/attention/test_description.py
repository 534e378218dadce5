"""How attention is told in one line: of every exported strategy, and of a user's own."""

from collections.abc import Callable
from functools import partial

import pytest

from muse_lightning.attention import AttentionStrategy, Dense, Muse, SlidingWindow, SpatialBlocks, describe_layers


class Decaying(AttentionStrategy):
    """A user's strategy that keeps one of its arguments."""

    def __init__(self, layer_idx: int, rate: float = 0.5, seed: int = 0) -> None:
        super().__init__(layer_idx)
        self.rate = rate


class Wordy(Dense):
    """A user's strategy that says more of itself, on two lines."""

    def extra_repr(self) -> str:
        return "layer by layer,\n  with care"


class Fixed(Muse):
    """MuSe with one argument left open."""

    def __init__(self, layer_idx: int, top_k: int = 4) -> None:
        super().__init__(layer_idx, chunk=512, top_k=top_k)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (Dense, "Dense"),
        (SlidingWindow, "SlidingWindow(window=2048)"),
        (partial(SlidingWindow, window=64), "SlidingWindow(window=64)"),
        (Muse, "Muse(chunk=2048, top_k=12)"),
        (
            partial(Muse, chunk=128, query_cluster=32, key_cluster=32, top_k=2, selection="centroid", exact_below=0),
            "Muse(chunk=128, top_k=2, query_cluster=32, key_cluster=32, selection=centroid, exact_below=0)",
        ),
        (SpatialBlocks, "SpatialBlocks(chunk=2048, top_k=12)"),
        (partial(SpatialBlocks, key_cluster=32), "SpatialBlocks(chunk=2048, top_k=12, key_cluster=32)"),
        (Decaying, "Decaying(rate=0.5)"),
        (Wordy, "Wordy(layer by layer, with care)"),
        (Fixed, "Fixed(chunk=512, top_k=4)"),
    ],
)
def test_a_strategy_and_what_it_was_given(make: Callable[[int], AttentionStrategy], said: str) -> None:
    assert describe_layers([make(layer) for layer in range(3)]) == said


@pytest.mark.parametrize(
    ("kinds", "said"),
    [
        ("MD", "Muse(chunk=2048, top_k=12), Dense in layer 1"),
        ("DMMD", "Dense, Muse(chunk=2048, top_k=12) in layers 1 and 2"),
        ("DMMMMD", "Muse(chunk=2048, top_k=12), Dense in layers 0 and 5"),
        ("DDDMMMMDM", "Muse(chunk=2048, top_k=12), Dense in layers 0 to 2 and 7"),
        ("DMDMDMM", "Muse(chunk=2048, top_k=12), Dense in layers 0, 2 and 4"),
        ("SSSDMSS", "SlidingWindow(window=2048), Dense in layer 3, Muse(chunk=2048, top_k=12) in layer 4"),
    ],
)
def test_layers_that_differ_are_named(kinds: str, said: str) -> None:
    makers: dict[str, Callable[[int], AttentionStrategy]] = {"M": Muse, "D": Dense, "S": SlidingWindow}
    assert describe_layers([makers[kind](layer) for layer, kind in enumerate(kinds)]) == said
