"""The same step computed twice: silent corruption that leaves every number finite shows in bits that differ."""

from contextlib import nullcontext
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import ParallelStrategy
from torch import Tensor
from torch.distributed.tensor import DTensor

from muse_lightning.checkpoints.random_state import random_state, restore_random_state
from muse_lightning.errors import UserError
from muse_lightning.numerics.step_inputs import StepInputs

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def check_verifiable(trainer: L.Trainer) -> None:
    """Refuse what does not give the same bits twice even on sound hardware.

    Raises:
        UserError: names the option.
    """
    if getattr(trainer.precision_plugin, "scaler", None) is not None:
        raise UserError(
            f"verify_every: trainer.precision {trainer.precision} scales gradients, which are not compared; accepted: "
            "bf16-mixed, bf16-true, 32-true"
        )
    if trainer.strategy.root_device.type != "cpu" and not torch.are_deterministic_algorithms_enabled():
        raise UserError(
            "verify_every: kernels of a GPU may add in any order, so that bits differ though nothing is wrong; give "
            "trainer.deterministic: true, or warn"
        )


def recompute(trainer: L.Trainer, pl_module: L.LightningModule, inputs: StepInputs) -> list[str]:
    """Compute the gradient of a step again, before the optimizer has used it. Takes the memory of one more gradient,
    and waits for the device.

    Args:
        inputs: of the step whose gradient the parameters have, complete and not yet clipped.
    Returns:
        Names of parameters whose gradient, or this rank's part of it, is not the same bit for bit. The parameters have
        the second one now.
    """
    first = {name: parameter.grad.clone() for name, parameter in _with_gradient(pl_module)}
    pl_module.zero_grad(set_to_none=True)
    later = random_state()
    is_counting: Any = getattr(pl_module, "is_counting", True)
    pl_module.is_counting = False  # type: ignore[assignment]
    try:
        with torch.enable_grad():
            _forward_and_backward(trainer, pl_module, inputs)
    finally:
        pl_module.is_counting = is_counting
        restore_random_state(later)
    second = {name: parameter.grad for name, parameter in _with_gradient(pl_module)}
    return [name for name in first if name not in second or not same_bits(first[name], second[name])]


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal bit for bit: NaN equals NaN, 0 differs from -0. Of shards, this rank's."""
    a, b = (tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in (a, b))
    bits = _BITS[a.element_size()]
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(bits), b.contiguous().view(bits))


def _with_gradient(module: torch.nn.Module) -> Any:
    return ((name, parameter) for name, parameter in module.named_parameters() if parameter.grad is not None)


def _forward_and_backward(trainer: L.Trainer, pl_module: L.LightningModule, inputs: StepInputs) -> None:
    """As Lightning's loop does, without the hooks: other callbacks measure there."""
    strategy = trainer.strategy
    for micro in inputs.micro_batches:
        restore_random_state(micro.random_state)
        is_last = micro is inputs.micro_batches[-1]
        is_blocked = isinstance(strategy, ParallelStrategy) and not is_last
        with strategy.block_backward_sync() if is_blocked else nullcontext():  # type: ignore[attr-defined]
            loss: Any = strategy.training_step(micro.batch, micro.batch_idx)
            pl_module.backward(loss / trainer.accumulate_grad_batches)
