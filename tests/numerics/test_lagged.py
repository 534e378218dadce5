"""Numbers are read in order, a fixed number of steps late."""

import pytest
import torch

from muse_lightning.numerics.lagged import LaggedReader


@pytest.mark.parametrize("lag", [0, 1, 3])
def test_order_and_lag(lag: int, device: torch.device) -> None:
    reader = LaggedReader(lag)
    found = []
    for number in range(5):
        values = torch.tensor([float(number), -1.0], device=device)
        reader.put(values)
        found.append(reader.take())
        values.fill_(9.0)  # the caller's own on a GPU; a processor's reader shares it
    late = [None if number < lag else number - lag for number in range(5)]
    assert [None if each is None else True for each in found] == [None if each is None else True for each in late]
    assert reader.pending == lag
    rest = []
    while (values_left := reader.take(is_last=True)) is not None:
        rest.append(values_left)
    assert len(rest) == lag
    assert reader.pending == 0
