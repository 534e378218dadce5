"""Optimizer steps of the tiny model: by Lightning's loop, and written out."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from muse_lightning.training.module import LanguageModel
from muse_lightning.training.optim import learning_rate_factor
from tests.tiny import TinyData, batches, tiny_model, tiny_trainer

STEPS = 5
CLIP = 0.5
OPTIONS = {"weight_decay": 0.3, "betas": (0.8, 0.9), "eps": 1e-6, "learning_rate": 3e-2, "warmup_steps": 2}


def by_lightning(folder: Path, optimizer: str, precision: str, device: str = "cpu") -> dict[str, Tensor]:
    """Parameters after STEPS steps, with a schedule and gradients clipped."""
    model = _start(optimizer)
    accelerator = "gpu" if device == "cuda" else "cpu"
    trainer = tiny_trainer(
        folder, max_steps=STEPS, precision=precision, gradient_clip_val=CLIP, accelerator=accelerator, logger=False
    )
    trainer.fit(model, TinyData(batches(STEPS)))
    return _parameters(model)


def by_hand(
    optimizer: str, precision: str, make: Callable[[LanguageModel], Sequence[Optimizer]], device: str = "cpu"
) -> dict[str, Tensor]:
    """The same steps; `make` gives the optimizers, to be stepped one after the other."""
    model = _start(optimizer).to(device)
    optimizers = make(model)
    factor = learning_rate_factor("cosine", max_steps=STEPS, warmup_steps=2, min_lr_ratio=0.1, decay_fraction=0.0)
    schedulers = [LambdaLR(each, factor) for each in optimizers]
    parameters = [p for each in optimizers for group in each.param_groups for p in group["params"]]
    assert len(parameters) == len(list(model.parameters()))
    autocast = torch.autocast(device, torch.bfloat16) if precision == "bf16-mixed" else nullcontext()
    for batch in batches(STEPS):
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        with autocast:
            loss = model.total_nats(batch) / batch["labels"].numel()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        assert norm > CLIP, "nothing was clipped"
        for each in (*optimizers, *schedulers):
            each.step()
        model.zero_grad()
    return _parameters(model)


def _start(optimizer: str) -> LanguageModel:
    torch.manual_seed(0)
    model = tiny_model(optimizer=optimizer, **OPTIONS)
    model.configure_model()
    return model


def _parameters(model: LanguageModel) -> dict[str, Tensor]:
    return {name: parameter.detach().cpu() for name, parameter in model.named_parameters()}
