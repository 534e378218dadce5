"""The oracle of a resume: the run that saved and went on. Their whole states before each update, compared exactly."""

import os
import random
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from muse_lightning.callbacks.ledger import Ledger
from muse_lightning.checkpoints.random_state import random_state
from muse_lightning.training.module import LanguageModel
from tests.recipe import Muse

STEPS = 9
SAVES = (
    f"--trainer.max_steps={STEPS}",
    "--trainer.callbacks+=DurableCheckpoint",
    "--trainer.callbacks.every_n_steps=2",
    # In the background a save that is due waits for the one before, so that its step would depend on the load.
    "--trainer.callbacks.is_asynchronous=false",
)
STOPS = ((2, "told"), (7, "killed"), (7, "told"))
"""Before the update after so many steps the run is told to stop, which saves one step later, or ends at once, which
loses what came after the last save."""
RESUMED_AT = (3, 6, 8)


class Killed(BaseException):
    """Ends a run where nothing may be saved any more."""


def whole_state(model: LanguageModel, batch: dict[str, Any]) -> dict[str, Any]:
    """All that decides how a training goes on, and how it came here, copied."""
    trainer = model.trainer
    (ledger,) = (callback for callback in trainer.callbacks if isinstance(callback, Ledger))
    (schedule,) = trainer.lr_scheduler_configs
    state = {
        "parameters": dict(model.state_dict()),
        "optimizer": trainer.optimizers[0].state_dict(),
        "schedule": schedule.scheduler.state_dict(),
        "random": random_state(),
        "tokens_seen": model.tokens_seen,
        "data": trainer.datamodule.state_dict(),
        "callbacks": {callback.state_key: callback.state_dict() for callback in trainer.callbacks},
        "hashes of all batches": ledger._hashes,
        "batch": {key: value for key, value in batch.items() if key != "record"},
    }
    return copied(state)


def copied(value: Any) -> Any:
    """Nested containers with their tensors copied, on the host."""
    if isinstance(value, torch.Tensor):
        return value.detach().cpu().clone()
    if isinstance(value, dict):
        return {key: copied(item) for key, item in value.items()}
    return [copied(item) for item in value] if isinstance(value, list | tuple) else value


def leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Everything in nested containers, with its place."""
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(item, f"{name}/{key}")
    else:
        yield name, value


def assert_same(found: Any, wanted: Any) -> None:
    found, wanted = dict(leaves(found)), dict(leaves(wanted))
    assert found.keys() == wanted.keys()
    for name, value in found.items():
        is_tensor = isinstance(value, torch.Tensor)
        assert torch.equal(value, wanted[name]) if is_tensor else value == wanted[name], name


def assert_same_checkpoints(found: Path, wanted: Path) -> None:
    """Compare what two checkpoints hold of a training, of all ranks."""
    ends = [torch.load(path, weights_only=True) for path in (found, wanted)]
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "random_states", "batch_hashes", "TokenDataModule"):
        assert_same(ends[0][key], ends[1][key])


@contextmanager
def watched(stop: tuple[int, str] | None = None) -> Iterator[dict[int, dict[str, Any]]]:
    """Inside, the states before each update of a training by its step; its loss depends on random numbers of all
    generators, as with dropout.

    Args:
        stop: when and how it is ended.
    """
    states: dict[int, dict[str, Any]] = {}
    step = LanguageModel.training_step

    def training_step(model: LanguageModel, batch: Any, batch_idx: int) -> Any:
        number = model.trainer.global_step
        if number not in states:
            states[number] = whole_state(model, batch)
            if stop == (number, "killed"):
                raise Killed
            if stop == (number, "told"):
                os.kill(os.getpid(), signal.SIGTERM)
        noise = torch.rand((), device=model.device) + random.random() + np.random.random_sample()
        return step(model, batch, batch_idx) * (1 + noise / 10)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LanguageModel, "training_step", training_step)
        yield states


def check_equal_to_uninterrupted(muse: Muse, *flags: str) -> None:
    """Train once through, once with three stops, and compare all states from every resume on."""
    fit = ("fit", *SAVES, *flags)
    with watched() as whole:
        code, _, err = muse.with_recipe(*fit, "--run.name=whole")
    assert code == 0, err
    assert sorted(whole) == list(range(STEPS))
    for number, stop in enumerate((*STOPS, None)):
        with watched(stop) as states:
            if stop is not None and stop[1] == "killed":
                with pytest.raises(Killed):
                    muse.with_recipe(*fit, "--resume")
            else:
                code, _, err = muse.with_recipe(*fit, "--resume")
                assert code == (0 if stop is None else 75), err
                assert "warning" not in err
        assert min(states) == (0, *RESUMED_AT)[number], err
        for step, state in states.items():
            assert_same(state, whole[step])
    assert max(states) == STEPS - 1
    (plan,) = whole[STEPS - 1]["data"]["train"]["plan"]["datasets"].values()
    assert plan["epoch"] > 1
    assert_same_checkpoints(
        *(Path(f"runs/{name}/version_0/checkpoints/step={STEPS}.ckpt") for name in ("tiny", "whole"))
    )
