"""A bit that flips in one of two computations of a step is found; two that are alike change nothing."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from muse_lightning.checkpoints.durable_io import DurableCheckpointIO
from muse_lightning.errors import NumericsError, UserError
from muse_lightning.numerics.failed_step import KEY, read_failed_step
from muse_lightning.numerics.verify import check_verifiable, same_bits
from tests.numerics.planting import OPTIONS, Plant, Planter, guarded
from tests.numerics.test_skipping import assert_same, fit
from tests.tiny import TinyData, batches, scalars, tiny_model, tiny_trainer

FLIPPED = "llama.model.layers.1.self_attn.k_proj.weight"


class Flip(L.Callback):
    """Flips the lowest bit of one number of one parameter's gradient, in one backward pass, counted from 1."""

    def __init__(self, backward: int) -> None:
        self.backward = backward
        self.count = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        pl_module.get_parameter(FLIPPED).register_hook(self._flip)

    def _flip(self, gradient: Tensor) -> Tensor:
        self.count += 1
        if self.count != self.backward:
            return gradient
        gradient = gradient.clone()
        gradient.view(torch.int32)[3, 4] ^= 1
        return gradient


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_without_a_fault_training_is_the_same(tmp_path: Path, optimizer: str, accumulate: int) -> None:
    data = batches(6 * accumulate, batch_size=1)
    runs = []
    for verify_every in (None, 2):
        torch.manual_seed(0)
        planter = Planter({})
        trainer = tiny_trainer(
            tmp_path / str(verify_every),
            max_steps=6,
            accumulate_grad_batches=accumulate,
            gradient_clip_val=0.5,
            callbacks=[planter, guarded(tmp_path, verify_every=verify_every)],
        )
        trainer.fit(tiny_model(optimizer=optimizer, **OPTIONS), TinyData(data))
        runs.append((planter.states, scalars(trainer)))
    assert_same(runs[0][0], runs[1][0])
    for tag in ("train/loss", "train/tokens"):
        assert runs[0][1][tag] == runs[1][1][tag]


# Backward passes: step 1 (never verified: 1), 2 (2, 3), 3 (4), 4 (5, 6).
@pytest.mark.parametrize(("backward", "step"), [(2, 2), (3, 2), (5, 4), (6, 4)])
def test_a_flipped_bit_is_found(tmp_path: Path, backward: int, step: int) -> None:
    guard, planter = guarded(tmp_path, verify_every=2), Planter({})
    trainer = tiny_trainer(
        tmp_path, max_steps=6, callbacks=[planter, guard, Flip(backward)], plugins=[DurableCheckpointIO()]
    )
    with pytest.raises(NumericsError) as found:
        trainer.fit(tiny_model(**OPTIONS), TinyData(batches(6, batch_size=1)))
    path = tmp_path / f"step={step}.replay.ckpt"
    said = f"step {step} computed twice has other bits in the gradient of {FLIPPED}"
    assert str(found.value) == f"{said}; step {step} is saved: muse fit --replay {path}"
    checkpoint = read_failed_step(path)
    assert checkpoint[KEY]["differs"] == [FLIPPED]
    # What could not be trusted was not trained on.
    for name, tensor in planter.states[step - 2].items():
        if name in checkpoint["state_dict"]:
            assert torch.equal(tensor, checkpoint["state_dict"][name]), name


@pytest.mark.parametrize(("verify_every", "backward"), [(1, 1), (2, 1), (2, 4)])
def test_a_step_that_is_not_verified_is_believed(tmp_path: Path, verify_every: int, backward: int) -> None:
    """The first of a process never is."""
    trainer = tiny_trainer(tmp_path, callbacks=[guarded(tmp_path, verify_every=verify_every), Flip(backward)])
    trainer.fit(tiny_model(**OPTIONS), TinyData(batches(4, batch_size=1)))


class Dropping(L.Callback):
    """A model that draws random numbers."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        pl_module.get_submodule("llama.model.layers.0.mlp").register_forward_hook(
            lambda module, args, output: torch.nn.functional.dropout(output, 0.3)
        )

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        torch.rand(1)  # drawn in between by something else, which is not drawn again


def test_random_numbers_are_drawn_again_and_others_follow(tmp_path: Path) -> None:
    states = []
    for verify_every in (None, 1):
        torch.manual_seed(0)
        planter = Planter({})
        guard = guarded(tmp_path, verify_every=verify_every)
        trainer = tiny_trainer(
            tmp_path, callbacks=[planter, guard, Dropping()], accumulate_grad_batches=2, logger=False
        )
        trainer.fit(tiny_model(**OPTIONS), TinyData(batches(8, batch_size=1)))
        states.append(planter.states)
    assert_same(*states)


def test_a_step_that_is_not_finite_twice_alike_is_skipped(tmp_path: Path) -> None:
    data = batches(4, batch_size=1)
    plants = {3: Plant("llama.model.norm")}
    guard = guarded(tmp_path, verify_every=1)
    planter = Planter(plants)
    torch.manual_seed(0)
    trainer = tiny_trainer(tmp_path, callbacks=[planter, guard], gradient_clip_val=0.5, logger=False)
    trainer.fit(tiny_model(**OPTIONS), TinyData(data))
    assert_same(planter.states, fit(tmp_path, "adamw", data, Planter(plants)).states)


def test_bits() -> None:
    nan = torch.tensor([float("nan"), 1.0])
    assert same_bits(nan, nan.clone())
    assert not same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert not same_bits(torch.ones(2, dtype=torch.bfloat16), torch.ones(2, dtype=torch.float16))
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        one = torch.ones(2, 3, dtype=dtype)
        assert same_bits(one.T, one.T.clone())
        assert not same_bits(
            one, torch.nextafter(one.float(), torch.tensor(2.0)).to(dtype) if dtype is torch.float32 else one * 1.01
        )


def test_precision_with_a_loss_scale_is_refused(tmp_path: Path) -> None:
    trainer: Any = tiny_trainer(tmp_path)
    trainer.precision_plugin.scaler = object()
    with pytest.raises(UserError, match=r"verify_every: trainer.precision .* accepted: bf16-mixed"):
        check_verifiable(trainer)


@pytest.mark.gpu
def test_on_a_gpu_only_where_it_is_deterministic(tmp_path: Path) -> None:
    options = {"accelerator": "gpu", "logger": False, "precision": "bf16-mixed"}
    data = TinyData(batches(4, batch_size=1))
    trainer = tiny_trainer(tmp_path, callbacks=[guarded(tmp_path, verify_every=2)], **options)
    with pytest.raises(UserError, match=r"trainer\.deterministic"):
        trainer.fit(tiny_model(**OPTIONS), data)
    try:
        trainer = tiny_trainer(tmp_path, callbacks=[guarded(tmp_path, verify_every=2)], deterministic="warn", **options)
        trainer.fit(tiny_model(**OPTIONS), data)
    finally:
        torch.use_deterministic_algorithms(False)
