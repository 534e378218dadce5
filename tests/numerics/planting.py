"""Numbers that are not finite, and flipped bits, put into chosen steps of the tiny model; and its steps by hand."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR

from muse_lightning.numerics.guard import NumericsGuard
from muse_lightning.training.module import LanguageModel
from muse_lightning.training.optim import learning_rate_factor, make_optimizer
from tests.tiny import tiny_model

CLIP = 0.5
OPTIONS: dict[str, Any] = {"weight_decay": 0.3, "learning_rate": 3e-2, "warmup_steps": 2}
LOSS = "the loss"
NEVER = 10_000
"""A number of steps in a row that no test reaches."""


@dataclass(frozen=True)
class Plant:
    """What is put where: in the output of a module ("forward"), or in the gradient there ("backward")."""

    module: str
    """LOSS: in the loss alone, whose gradient stays as it is."""
    where: str = "forward"
    value: float = math.nan


class Planter(L.Callback):
    """Puts plants into optimizer steps, numbered from 1, and keeps the state that each step leaves.

    Args:
        plants: by step.
        micro_batch: in which one of a step.
        rank: on which one alone; None: on all.
    """

    def __init__(self, plants: Mapping[int, Plant], micro_batch: int = 0, rank: int | None = None) -> None:
        self.plants = plants
        self.micro_batch = micro_batch
        self.rank = rank
        self.states: list[dict[str, Tensor]] = []
        self._handles: list[Any] = []
        self._step, self._seen = 0, 0

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step + 1
        self._step, self._seen = step, self._seen + 1 if step == self._step else 0
        plant = self.plants.get(step)
        if plant is not None and self._seen == self.micro_batch and self.rank in (None, trainer.global_rank):
            self._handles = [plant_in(pl_module, plant)]

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if trainer.global_step == self._step:
            self.states.append(state_of(pl_module, trainer.optimizers[0]))


def plant_in(model: nn.Module, plant: Plant) -> Any:
    """Lay it into the next forward pass; returns what removes it."""
    if plant.module == LOSS:
        return _InLoss(model, plant.value)

    def spoil(tensor: Tensor) -> Tensor:
        spoilt = tensor.clone()
        spoilt[(0,) * tensor.ndim] = plant.value
        return spoilt

    def on_output(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        if plant.where == "forward":
            return spoil(output)
        output.register_hook(spoil)
        return None

    return model.get_submodule(plant.module).register_forward_hook(on_output)


class _InLoss:
    """Adds a constant to the loss."""

    def __init__(self, model: Any, value: float) -> None:
        self._model, total_nats = model, model.total_nats
        model.total_nats = lambda batch: total_nats(batch) + value

    def remove(self) -> None:
        del self._model.total_nats


def state_of(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Copies of all parameters and of the whole state of their optimizer, counts of steps included. Shards are
    gathered."""
    found = {name: whole(parameter.detach()) for name, parameter in module.named_parameters()}
    for name, parameter in module.named_parameters():
        for key, value in optimizer.state[parameter].items():
            found[f"{name} {key}"] = whole(value)
    return found


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()


def modules_of(model: LanguageModel) -> list[str]:
    """Modules whose output is one tensor with a gradient: projections, norms, networks, blocks, attention."""
    names = {name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Embedding)}
    names |= {name for name, _ in model.named_modules() if name.endswith(("norm", "mlp", "attention"))}
    return sorted(names - {"llama.lm_head"})  # The loss reads its weight and does not call it.


def by_hand(
    optimizer: str,
    batches: list[dict[str, Tensor]],
    left_out: Iterable[int],
    *,
    accumulate: int = 1,
    clip: float | None = CLIP,
) -> list[dict[str, Tensor]]:
    """The state after each of the steps, of which some are left out: their batches are not looked at, and only the
    schedule goes on."""
    torch.manual_seed(0)
    model = tiny_model(optimizer=optimizer, **OPTIONS)
    model.configure_model()
    stepped = make_optimizer(model.parameter_groups(), fused=True)
    steps = len(batches) // accumulate
    factor = learning_rate_factor("cosine", max_steps=steps, warmup_steps=2, min_lr_ratio=0.1, decay_fraction=0.0)
    scheduler = LambdaLR(stepped, factor)
    states = []
    for step in range(1, steps + 1):
        if step not in left_out:
            for batch in batches[(step - 1) * accumulate : step * accumulate]:
                (model.total_nats(batch) / batch["labels"].numel() / accumulate).backward()
            if clip is not None:
                # In the order in which Lightning sums.
                parameters = [p for group in stepped.param_groups for p in group["params"]]
                torch.nn.utils.clip_grad_norm_(parameters, clip)
            stepped.step()
            model.zero_grad()
        scheduler.step()
        states.append(state_of(model, stepped))
    return states


def guarded(folder: Path | None = None, **options: Any) -> NumericsGuard:
    """A guard that does not stop unless the options say so."""
    return NumericsGuard(**({"stop_after": NEVER, "dirpath": folder} | options))
