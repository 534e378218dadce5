"""An optimizer step that does nothing, decided on the device."""

from torch import Tensor
from torch.optim import AdamW, Optimizer

from muse_lightning.training.muon import MuonWithAdamW

_CAN_SKIP = ("cpu", "cuda")
"""Devices whose fused AdamW obeys `found_inf`."""


def skip_where(optimizer: Optimizer, is_skipped: Tensor) -> None:
    """Let the next step of an optimizer change neither parameters nor its state, its count of steps included, where a
    flag is set; where it is not, the step is bit for bit what it would have been.

    Fused AdamW on CPU and CUDA and `MuonWithAdamW` look at the flag on the device. For others this waits for the flag
    and removes the gradients, without which there is no step.

    Args:
        optimizer: whose gradients are complete.
        is_skipped: float32 [] of 0 or 1, on the device of the parameters.
    """
    if can_skip_on_device(optimizer):
        optimizer.found_inf = is_skipped  # type: ignore[attr-defined]  # as torch.amp.GradScaler gives it
    elif is_skipped.item():
        optimizer.zero_grad(set_to_none=True)


def can_skip_on_device(optimizer: Optimizer) -> bool:
    """Whether an optimizer skips without the host."""
    adamw = [group for group in optimizer.param_groups if "momentum" not in group]
    return isinstance(optimizer, AdamW | MuonWithAdamW) and all(
        group["fused"] and parameter.device.type in _CAN_SKIP for group in adamw for parameter in group["params"]
    )
