"""A step that is skipped leaves the state of a run that has never seen its batch, bit for bit; another one is not
changed by being watched."""

import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import SGD, AdamW

from muse_lightning.numerics.skipping import can_skip_on_device, skip_where
from muse_lightning.training.optim import make_optimizer
from tests.numerics.planting import CLIP, LOSS, NEVER, OPTIONS, Plant, Planter, by_hand, guarded, modules_of
from tests.tiny import TinyData, batches, tiny_model, tiny_trainer

BAD = (math.nan, math.inf, -math.inf)


def fit(
    folder: Path,
    optimizer: str,
    data: list[dict[str, Tensor]],
    planter: Planter,
    *,
    is_guarded: bool = True,
    accumulate: int = 1,
    clip: float | None = CLIP,
    accelerator: str = "cpu",
    **options: Any,
) -> Planter:
    torch.manual_seed(0)
    trainer = tiny_trainer(
        folder,
        max_steps=len(data) // accumulate,
        accumulate_grad_batches=accumulate,
        gradient_clip_val=clip,
        callbacks=[planter, *([guarded(folder)] if is_guarded else [])],
        logger=False,
        accelerator=accelerator,
        **options,
    )
    trainer.fit(tiny_model(optimizer=optimizer, **OPTIONS), TinyData(data))
    assert len(planter.states) == trainer.global_step == len(data) // accumulate
    return planter


def assert_same(found: Sequence[dict[str, Tensor]], wanted: Sequence[dict[str, Tensor]]) -> None:
    assert len(found) == len(wanted)
    for number, (a, b) in enumerate(zip(found, wanted, strict=True), start=1):
        different = [name for name in a.keys() | b.keys() if not torch.equal(a[name], b[name])]
        assert not different, f"after step {number}: {different}"


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_hundred_random_layers_and_steps(tmp_path: Path, optimizer: str) -> None:
    choice = random.Random(0)
    data = batches(160, batch_size=1)
    modules = modules_of(tiny_model())
    assert len(modules) > 15
    planted = {
        # The first step is taken: one that is skipped leaves zeros where one that was not taken leaves no state yet.
        step: Plant(choice.choice(modules), choice.choice(["forward", "backward"]), choice.choice(BAD))
        for step in choice.sample(range(2, 161), 100)
    }
    assert len({(plant.module, step) for step, plant in planted.items()}) == 100
    found = fit(tmp_path, optimizer, data, Planter(planted))
    assert_same(found.states, by_hand(optimizer, data, planted))
    steps = {int(value) for name, value in found.states[-1].items() if name.endswith(" step")}
    assert steps == {60}


@pytest.mark.parametrize("clip", [None, CLIP], ids=["unclipped", "clipped"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_where_nothing_is_skipped_the_guard_changes_nothing(tmp_path: Path, optimizer: str, clip: float | None) -> None:
    data = batches(20, batch_size=1)
    on, off = (fit(tmp_path, optimizer, data, Planter({}), is_guarded=g, clip=clip) for g in (True, False))
    assert_same(on.states, off.states)
    assert_same(on.states, by_hand(optimizer, data, [], clip=clip))


@pytest.mark.parametrize("clip", [None, CLIP], ids=["unclipped", "clipped"])
@pytest.mark.parametrize("micro_batch", [0, 2])
def test_one_bad_micro_batch_skips_the_whole_step(tmp_path: Path, micro_batch: int, clip: float | None) -> None:
    data = batches(12, batch_size=1)
    plant = Plant("llama.model.layers.1.mlp")
    found = fit(tmp_path, "adamw", data, Planter({3: plant}, micro_batch), accumulate=3, clip=clip)
    assert_same(found.states, by_hand("adamw", data, [3], accumulate=3, clip=clip))


@pytest.mark.parametrize("value", BAD)
def test_a_loss_that_is_not_finite_with_a_gradient_that_is(tmp_path: Path, value: float) -> None:
    """In the first of two micro-batches."""
    data = batches(10, batch_size=1)
    found = fit(tmp_path, "adamw", data, Planter({3: Plant(LOSS, value=value)}), accumulate=2)
    assert_same(found.states, by_hand("adamw", data, [3], accumulate=2))


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
def test_the_very_first_step(tmp_path: Path) -> None:
    data = batches(5, batch_size=1)
    found = fit(tmp_path, "adamw", data, Planter({1: Plant("llama.model.norm")}))
    assert_same(found.states[1:], by_hand("adamw", data, [1])[1:])


def test_bf16_mixed(tmp_path: Path) -> None:
    data = batches(6, batch_size=1)
    plants = {3: Plant("llama.model.layers.0.mlp", "backward", math.inf)}
    found = fit(tmp_path, "adamw", data, Planter(plants), precision="bf16-mixed")
    assert_same([found.states[2]], [found.states[1]])
    assert not torch.equal(*(found.states[n]["llama.model.norm.weight"] for n in (2, 3)))


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("is_skipped", [True, False])
def test_optimizers_that_do_not_look_at_the_flag_lose_their_gradients(fused: bool, is_skipped: bool) -> None:
    for make in (lambda p: AdamW(p, fused=fused), lambda p: SGD(p, lr=1.0)):
        parameter = torch.nn.Parameter(torch.ones(3))
        optimizer = make([parameter])
        parameter.grad = torch.full((3,), math.nan if is_skipped else 1.0)
        skip_where(optimizer, torch.tensor(float(is_skipped)))
        optimizer.step()
        assert torch.equal(parameter.detach(), torch.ones(3)) is is_skipped
        assert can_skip_on_device(optimizer) is (fused and isinstance(optimizer, AdamW))


@pytest.mark.gpu
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_skipped_on_a_gpu(tmp_path: Path, optimizer: str, precision: str) -> None:
    data = batches(8, batch_size=1)
    plants = {
        3: Plant("llama.model.layers.0.mlp"),
        4: Plant("llama.model.layers.1.mlp", "backward", math.inf),
        6: Plant("llama.model.norm", value=math.inf),
    }
    found = fit(tmp_path, optimizer, data, Planter(plants), accelerator="gpu", precision=precision)
    for step in plants:
        assert_same([found.states[step - 1]], [found.states[step - 2]])
    assert {int(value) for name, value in found.states[-1].items() if name.endswith(" step")} == {5}


@pytest.mark.gpu
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_flag_that_is_not_set_changes_nothing_on_a_gpu(optimizer: str) -> None:
    """The same gradients into an optimizer with a flag and one without: no kernel that adds in any order is involved,
    and Newton-Schulz multiplies the same matrices."""
    states = []
    for has_flag in (True, False):
        torch.manual_seed(0)
        model = tiny_model(optimizer=optimizer)
        model.configure_model()
        model = model.cuda()
        stepped = make_optimizer(model.parameter_groups(), fused=True)
        generator = torch.Generator().manual_seed(1)
        for _ in range(20):
            for parameter in model.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator).cuda()
            if has_flag:
                skip_where(stepped, torch.zeros((), device="cuda"))
            stepped.step()
        found = {name: parameter.detach() for name, parameter in model.named_parameters()}
        states.append(found | {f"{n} {k}": v for n, p in model.named_parameters() for k, v in stepped.state[p].items()})
    assert_same(states[:1], states[1:])


@pytest.mark.gpu
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_no_step_waits_for_the_gpu(tmp_path: Path, optimizer: str) -> None:
    """The guard's part of a step, in which PyTorch refuses whatever waits for the device."""
    torch.manual_seed(0)
    model = tiny_model(optimizer=optimizer)
    model.configure_model()
    model = model.cuda()
    stepped = make_optimizer(model.parameter_groups(), fused=True)
    guard = guarded(tmp_path, stop_after=NEVER)
    trainer = tiny_trainer(tmp_path, accelerator="gpu", logger=False, log_every_n_steps=0)
    guard.on_train_start(trainer, model)
    batch = {name: tensor.cuda() for name, tensor in batches(1)[0].items()}
    for value in (1.0, math.nan, math.inf, 1.0):
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, value)
        loss = torch.tensor(1.0, device="cuda")
        stepped.step() if value == 1.0 and not stepped.state else None  # state and its first memory
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            guard.on_train_batch_start(trainer, model, batch, 0)
            guard.on_before_backward(trainer, model, loss)
            guard.on_before_optimizer_step(trainer, model, stepped)
            stepped.step()
            guard._is_step_over = True
            guard._reader.take()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert guard.state_dict() == {"consecutive_skipped_steps": 0, "skipped_steps": 2}
