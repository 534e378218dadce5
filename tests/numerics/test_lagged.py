"""Numbers are read in order, a fixed number of steps late."""

import pytest
import torch

from muse_lightning.numerics.lagged import LaggedReader


@pytest.mark.parametrize("lag", [0, 1, 3])
def test_order_and_lag(lag: int, device: torch.device) -> None:
    reader = LaggedReader(lag)
    found = []
    for number in range(5):
        reader.put(torch.tensor([float(number), -1.0], device=device))
        found.append(reader.take())
    assert found == [None if number < lag else [number - lag, -1.0] for number in range(5)]
    assert reader.pending == lag
    rest = [reader.take(is_last=True) for _ in range(lag)]
    assert rest == [[number, -1.0] for number in range(5 - lag, 5)]
    assert reader.take(is_last=True) is None
