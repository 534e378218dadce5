"""Reads a folder of checkpoints without the code that wrote it: JSON, SHA-256, tensors, the values they must have."""

import hashlib
import json
import pickle
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path

import torch

from tests.faults.sweep.training import expected_state


@dataclass
class Found:
    """What is in a folder."""

    whole: set[int] = field(default_factory=set)
    """Steps whose checkpoint fits its manifest and holds the right state."""
    false: dict[int, str] = field(default_factory=dict)
    """Steps with a manifest that can be read and does not fit, and why."""
    orphans: set[int] = field(default_factory=set)
    """Steps with a checkpoint and no manifest that can be read."""
    leftovers: list[str] = field(default_factory=list)
    """Names that are no checkpoint and no manifest."""


def read(folder: Path) -> Found:
    """Read every file of a folder to its end."""
    found = Found()
    names = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    for name in names:
        if not name.startswith("step=") or not name.endswith((".ckpt", ".manifest.json")):
            found.leftovers.append(name)
    for step in {int(name.removeprefix("step=").split(".")[0]) for name in names if name not in found.leftovers}:
        try:
            manifest = json.loads((folder / f"step={step}.manifest.json").read_bytes())
        except (OSError, ValueError):
            found.orphans.add(step)
            continue
        problem = _problem(folder / f"step={step}.ckpt", step, manifest)
        if problem is None:
            found.whole.add(step)
        else:
            found.false[step] = problem
    return found


def _problem(path: Path, step: int, manifest: dict[str, object]) -> str | None:
    try:
        content = path.read_bytes()
    except OSError as error:
        return type(error).__name__
    if manifest["step"] != step or manifest["size_bytes"] != len(content):
        return f"step {manifest['step']}, {manifest['size_bytes']} bytes; it has {len(content)}"
    if manifest["sha256"] != hashlib.sha256(content).hexdigest():
        return "SHA-256 differs"
    try:
        state = torch.load(BytesIO(content), weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
        return f"cannot be loaded: {error}"
    weight, momentum = expected_state(step)
    stored = state["optimizer_states"][0]["state"][0]["momentum_buffer"]
    if state["global_step"] != step or bool((state["state_dict"]["weight"] != weight).any()):
        return f"holds another step's weights ({state['global_step']})"
    return None if bool((stored == momentum).all()) else "holds another step's momentum"
