"""What the optimizer sees: parameter groups, and the learning rate as a function of the step."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from muse_lightning.errors import UserError
from muse_lightning.model.llama import Llama
from muse_lightning.training.muon import MuonWithAdamW

OptimizerName = Literal["adamw", "muon"]
Schedule = Literal["cosine", "wsd"]


def parameter_groups(
    llama: Llama,
    optimizer: OptimizerName,
    *,
    learning_rate: float,
    weight_decay: float,
    betas: tuple[float, float],
    eps: float,
    momentum: float,
) -> list[dict[str, Any]]:
    """What is optimized, and how: matrices decay, norms and biases (anything of one dimension) do not.

    Args:
        optimizer: "adamw" for two groups, matrices and the rest; "muon" for three, the first of which, the matrices of
            blocks, is Muon's. Embedding and head remain AdamW's: their rows are tokens of their own.
        learning_rate, weight_decay: of both.
        betas, eps: AdamW's.
        momentum: Muon's.
    Returns:
        Groups for `make_optimizer`.
    """
    trained = [parameter for parameter in llama.parameters() if parameter.requires_grad]
    of_blocks = {id(parameter) for parameter in llama.model.layers.parameters()} if optimizer == "muon" else set()
    muon = [p for p in trained if p.ndim == 2 and id(p) in of_blocks]
    adamw = {"lr": learning_rate, "betas": betas, "eps": eps}
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trained if p.ndim >= 2 and id(p) not in of_blocks], "weight_decay": weight_decay}
        | adamw,
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0} | adamw,
    ]
    if optimizer == "muon":
        groups.insert(0, {"params": muon, "weight_decay": weight_decay, "lr": learning_rate, "momentum": momentum})
    return groups


def make_optimizer(groups: list[dict[str, Any]], *, fused: bool) -> Optimizer:
    """The optimizer of `parameter_groups`; `fused` is AdamW's."""
    muon = [group for group in groups if "momentum" in group]
    adamw = [group for group in groups if "momentum" not in group]
    if muon:
        return MuonWithAdamW(muon, adamw, fused=fused)
    optimizer = AdamW(adamw, fused=fused)
    # A fused optimizer offers to unscale gradients itself, and Lightning refuses to clip for one that does, in any
    # mixed precision. Declined, the loss scaler (16-mixed alone has one) unscales before clipping, as for others.
    optimizer._step_supports_amp_scaling = False
    return optimizer


def check_states(states: Sequence[Mapping[str, Any]], optimizer: OptimizerName, path: object) -> None:
    """Refuse optimizer states of the other optimizer.

    Args:
        states: state dicts, of a checkpoint.
        optimizer: the recipe's.
        path: the checkpoint's, to be named.
    Raises:
        UserError: one is of the other.
    """
    for state in states:
        found = "muon" if any("momentum" in group for group in state["param_groups"]) else "adamw"
        if found != optimizer:
            raise UserError(
                f"model.optimizer is {optimizer}, and checkpoint {path} was trained with {found}; accepted: {found}, "
                f"or model.weights: {path} in place of the checkpoint, which starts anew from its weights"
            )


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


def check_max_steps(max_steps: int) -> None:
    """What every schedule needs.

    Raises:
        UserError: it is not known how many optimizer steps there will be, or there will be none.
    """
    if max_steps < 1:
        raise UserError(
            f"trainer.max_steps is {max_steps}; the schedule needs the number of optimizer steps, at least 1"
        )


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
        UserError: max_steps is not known, or 0.
    """
    check_max_steps(max_steps)
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


def apply_hyperparameters(scheduler: LambdaLR, wanted: Sequence[Mapping[str, Any]]) -> list[str]:
    """Let the recipe win over what a resumed checkpoint brought into the optimizer and its scheduler.

    Args:
        scheduler: of an optimizer with the groups of `parameter_groups`.
        wanted: those groups, as the recipe has them.
    Returns:
        One line per value that differed.
    """
    differences: dict[str, None] = {}
    groups = scheduler.optimizer.param_groups
    scheduler.base_lrs = [group["lr"] for group in wanted]
    for group, factor, recipe in zip(groups, scheduler.lr_lambdas, wanted, strict=True):
        options = {"initial_lr": recipe["lr"]}
        options |= {name: value for name, value in recipe.items() if name not in ("params", "lr")}
        for name, value in options.items():
            # A gathered state has lists for tuples.
            before = tuple(group[name]) if isinstance(group[name], list) else group[name]
            if before != value:
                field = "learning_rate" if name == "initial_lr" else name
                differences[f"model.{field}: {before} in the checkpoint, {value} in this recipe, which wins"] = None
        group.update(options | {"lr": recipe["lr"] * factor(scheduler.last_epoch)})
    return list(differences)
