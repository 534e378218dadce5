"""What the optimizer sees: parameter groups, and the learning rate as a function of the step."""

import math
from collections.abc import Callable
from typing import Any, Literal

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from muse_lightning.errors import UserError

Schedule = Literal["cosine", "wsd"]


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: matrices, which decay, and norms and biases (anything of one dimension), which do not."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


def numbered_by_model(state: dict[str, Any], optimizer: Optimizer, model: nn.Module) -> dict[str, Any]:
    """An optimizer's state dict with parameters numbered in the order of the model, not in that of the groups.

    Any optimizer of the same groups loads it as before. Lightning takes the numbers of a file for those of the model
    when it gives shards their part, and would give one parameter the moments of another.

    Args:
        state: `optimizer.state_dict()`.
        model: has all parameters of the optimizer.
    """
    places = {parameter: place for place, parameter in enumerate(model.parameters())}
    numbers = {
        number: places[parameter]
        for group, saved in zip(optimizer.param_groups, state["param_groups"], strict=True)
        for parameter, number in zip(group["params"], saved["params"], strict=True)
    }
    groups = [group | {"params": [numbers[number] for number in group["params"]]} for group in state["param_groups"]]
    return state | {
        "state": {numbers[number]: values for number, values in state["state"].items()},
        "param_groups": groups,
    }


def learning_rate_factor(
    schedule: Schedule, *, max_steps: int, warmup_steps: int, min_lr_ratio: float, decay_fraction: float
) -> Callable[[int], float]:
    """The learning rate over its peak, as a function of the optimizer step (from 0).

    Both schedules warm up linearly: step s gets (s + 1) / warmup_steps. `cosine` then falls along half a cosine.
    `wsd` (warm-up, stable, decay: arXiv 2404.06395) stays at the peak and falls linearly over the last `decay_fraction`
    of max_steps. Both would reach `min_lr_ratio` at step max_steps, the first one not taken: no step is wasted at zero.
    A run shorter than its warm-up is all warm-up, so that a recipe can be tried for a few steps.

    Args:
        schedule: which of the two.
        max_steps: `trainer.max_steps`, the step at which training ends. (Not `trainer.estimated_stepping_batches`:
            reading that makes a resumed run restart its data.)
        warmup_steps: length of the warm-up.
        min_lr_ratio: factor reached at the end.
        decay_fraction: length of the final decay over max_steps; `wsd` only.
    Raises:
        UserError: max_steps is not known.
    """
    if max_steps < 1:
        raise UserError(
            f"trainer.max_steps is {max_steps}; the schedule needs the number of optimizer steps, at least 1"
        )
    decay_steps = round(decay_fraction * max_steps) if schedule == "wsd" else max_steps
    decay_start = max(warmup_steps, max_steps - decay_steps)

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        if step < decay_start:
            return 1.0
        progress = min(1.0, (step - decay_start) / max(1, max_steps - decay_start))
        remaining = 1 - progress if schedule == "wsd" else (1 + math.cos(math.pi * progress)) / 2
        return min_lr_ratio + (1 - min_lr_ratio) * remaining

    return factor


def apply_hyperparameters(
    scheduler: LambdaLR, learning_rate: float, weight_decay: float, betas: tuple[float, float], eps: float
) -> list[str]:
    """Let the recipe win over what a resumed checkpoint brought into the optimizer and its scheduler.

    Args:
        scheduler: of an optimizer with the groups of `parameter_groups`.
        learning_rate, weight_decay, betas, eps: the recipe's.
    Returns:
        One line per value that differed.
    """
    groups = scheduler.optimizer.param_groups
    wanted = {"initial_lr": learning_rate, "weight_decay": weight_decay, "betas": betas, "eps": eps}
    field_names = {"initial_lr": "learning_rate"}
    differences = [
        f"model.{field_names.get(name, name)}: {groups[0][name]} in the checkpoint, {value} in this recipe, which wins"
        for name, value in wanted.items()
        if groups[0][name] != value
    ]
    scheduler.base_lrs = [learning_rate] * len(groups)
    for group, factor, decay in zip(groups, scheduler.lr_lambdas, (weight_decay, 0.0), strict=True):
        group.update(wanted | {"weight_decay": decay, "lr": learning_rate * factor(scheduler.last_epoch)})
    return differences
