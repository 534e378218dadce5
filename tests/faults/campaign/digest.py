"""Hashes of everything that a training goes on from: equal hashes, equal bits."""

import hashlib
from typing import Any

import numpy as np
import torch


def digest(value: Any) -> str:
    """Hash of nested dictionaries and sequences of tensors and plain values; no order of keys, every bit of numbers."""
    hasher = hashlib.blake2b(digest_size=12)
    _feed(hasher, value)
    return hasher.hexdigest()


def _feed(hasher: Any, value: Any) -> None:
    if isinstance(value, torch.Tensor):
        array = value.detach().cpu().contiguous()
        hasher.update(f"tensor {array.dtype} {tuple(array.shape)}".encode())
        hasher.update(array.view(torch.uint8).numpy().data if array.ndim else array.numpy().tobytes())
    elif isinstance(value, np.ndarray):
        hasher.update(f"array {value.dtype} {value.shape}".encode() + value.tobytes())
    elif isinstance(value, dict):
        hasher.update(f"dict {len(value)}".encode())
        for key in sorted(value, key=repr):
            hasher.update(repr(key).encode())
            _feed(hasher, value[key])
    elif isinstance(value, list | tuple):
        hasher.update(f"list {len(value)}".encode())
        for item in value:
            _feed(hasher, item)
    else:
        hasher.update(f"{type(value).__name__} {value!r}".encode())


def state_digests(trainer: Any, module: Any) -> dict[str, str]:
    """What must be equal before an update, each part by itself so that a difference has a name."""
    from muse_lightning.checkpoints.random_state import random_state

    return {
        "parameters": digest(module.state_dict()),
        "optimizer": digest([optimizer.state_dict() for optimizer in trainer.optimizers]),
        "schedule": digest([config.scheduler.state_dict() for config in trainer.lr_scheduler_configs]),
        "random": digest(random_state()),
        "data": digest(trainer.datamodule.state_dict()),
        "callbacks": digest({callback.state_key: callback.state_dict() for callback in trainer.callbacks}),
        "step": str(trainer.global_step),
    }
