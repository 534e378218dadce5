"""All generators go on where they were."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from muse_lightning.checkpoints.random_state import random_state, restore_random_state


def draws(device: str) -> list[object]:
    normal = torch.randn(3, device=device)
    return [
        random.random(),
        random.gauss(0, 1),
        np.random.rand(),
        np.random.randn(),
        torch.rand(3).tolist(),
        normal.tolist(),
    ]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_what_follows_is_the_same(tmp_path: Path, device: str) -> None:
    draws(device)  # an odd number of normal ones: both generators keep the second of a pair
    torch.save(random_state(), tmp_path / "state")
    expected = draws(device)
    assert draws(device) != expected
    restore_random_state(torch.load(tmp_path / "state", weights_only=True))
    assert draws(device) == expected
