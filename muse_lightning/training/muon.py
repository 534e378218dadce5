"""Muon for the matrices of blocks and AdamW for everything else, as the one optimizer that Lightning's loop takes."""

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy, Strategy
from torch import Tensor
from torch.optim import AdamW, Muon, Optimizer

from muse_lightning.errors import UserError


class MuonWithAdamW(Optimizer):
    """torch.optim.Muon and torch.optim.AdamW, side by side: their parameter groups and their states are this one's.

    Muon's step is scaled to the size of AdamW's, so that both take the same learning rate and weight decay.

    Where its attribute `found_inf` is 1 (float32 [], as a fused AdamW has it) a step changes nothing, which is decided
    on the device.

    Args:
        muon: parameter groups with options of Muon, matrices.
        adamw: parameter groups with options of AdamW.
        fused: of AdamW.
    Source: Muon (Jordan et al. 2024); its scale for language models, Moonlight (arXiv 2502.16982), section 2.2.
    """

    def __init__(self, muon: list[dict[str, Any]], adamw: list[dict[str, Any]], *, fused: bool) -> None:
        self._muon = Muon(muon, adjust_lr_fn="match_rms_adamw")
        self._adamw = AdamW(adamw, fused=fused)
        super().__init__([*self._muon.param_groups, *self._adamw.param_groups], {})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of both, after `closure`, whose result is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # Here and not once: loading a state replaces groups and state by others.
        self._muon.param_groups = [group for group in self.param_groups if "momentum" in group]
        self._adamw.param_groups = [group for group in self.param_groups if "momentum" not in group]
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        self._muon.state = self._adamw.state = self.state
        self._adamw.found_inf = found_inf  # type: ignore[attr-defined]
        self._adamw.step()
        if found_inf is None:
            self._muon.step()
        else:
            self._step_muon_unless(found_inf)
        return loss

    def _step_muon_unless(self, found_inf: Tensor) -> None:
        """One matrix at a time, so that what must be kept of it is no more than one."""
        is_skipped = found_inf.bool()
        for group in self._muon.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                momentum = self.state[parameter].get("momentum_buffer")
                kept = parameter.clone(), torch.zeros_like(parameter) if momentum is None else momentum.clone()
                self._muon.param_groups = [group | {"params": [parameter]}]
                self._muon.step()
                for tensor, before in zip((parameter, self.state[parameter]["momentum_buffer"]), kept, strict=True):
                    tensor.copy_(torch.where(is_skipped, before, tensor))


def check_strategy(strategy: Strategy) -> None:
    """Refuse a strategy that leaves a process with parts of matrices, for Muon multiplies them with themselves.

    Raises:
        UserError: names the strategy.
    """
    if not isinstance(strategy, SingleDeviceStrategy | DDPStrategy) or isinstance(strategy, DeepSpeedStrategy):
        raise UserError(
            "model.optimizer is muon, which needs whole matrices; "
            f"trainer.strategy {type(strategy).__name__} may shard them; accepted: one device or ddp"
        )
