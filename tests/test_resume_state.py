"""A resumed run is the run that saved and went on: before each update their whole states are equal, exactly."""

import pytest
import torch

from tests.recipe import Muse
from tests.resumed import assert_same, check_equal_to_uninterrupted, watched

BATCHES = ("--data.batch_size=12",)
"""Four in an epoch: the run is stopped in the first, in the second and at its end, before a validation."""
CASES = {
    "adamw": BATCHES,
    "muon-accumulated-workers": (
        "--data.batch_size=6",
        "--model.optimizer=muon",
        "--model.recompute=block",
        "--trainer.accumulate_grad_batches=2",
        "--data.num_workers=2",
    ),
    "compiled": (*BATCHES, "--model.compiled=true"),
}


@pytest.fixture
def muse(muse_with_dataset: Muse) -> Muse:
    return muse_with_dataset


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[] if case == "adamw" else pytest.mark.slow) for case in CASES]
)
def test_three_stops_in_two_epochs(muse: Muse, case: str) -> None:
    check_equal_to_uninterrupted(muse, *CASES[case])


def test_another_attention_on_purpose(muse: Muse) -> None:
    """It loads, one line says so, and the training goes on from the same state."""
    fit = ("fit", "--trainer.max_steps=2", "--trainer.limit_val_batches=0")
    assert muse.with_recipe(*fit)[0] == 0
    with watched() as states:
        code, _, err = muse.with_recipe(
            *fit, "--resume", "--trainer.max_steps=3", "--model.attention={class_path: Dense, init_args: {}}"
        )
    assert code == 0, err
    (line,) = [line for line in err.splitlines() if "model.attention" in line]
    place = "runs/tiny/version_0/checkpoints/step=2.ckpt"
    names = [f"muse_lightning.attention.{name}" for name in ("Muse", "Dense")]
    assert line == f"model.attention.class_path: {names[0]} in {place}, {names[1]} in this recipe, which wins"
    saved = torch.load(place, weights_only=True)
    assert sorted(states) == [2]
    assert_same(states[2]["parameters"], dict(saved["state_dict"]))
