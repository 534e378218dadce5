"""The file of a step that can be replayed: a checkpoint with the step's batches, and what it found, under one key."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from muse_lightning.checkpoints.choice import damage_of
from muse_lightning.checkpoints.manifest import CHECKPOINT_SUFFIX
from muse_lightning.errors import UserError
from muse_lightning.numerics.step_inputs import StepInputs
from muse_lightning.training.weights import read_checkpoint

KEY = "numerics"
"""Of the checkpoint's dictionary."""


@dataclass
class FailedStep:
    """A step that a run was stopped at, while the run lasts."""

    inputs: StepInputs
    """This rank's."""
    loss: float
    """Mean over micro-batches and ranks, as it is minimised."""
    norm: float
    """Of the gradient, before clipping."""
    row: int = 1
    """Steps in a row, this one included, that had been skipped."""
    differs: list[str] = field(default_factory=list)
    """Parameters whose gradient was not the same twice; none where the numbers were not finite."""

    def as_saved(self, ranks: list[Any], accumulate: int, settings: str) -> dict[str, Any]:
        """The value of KEY: tensors and plain values.

        Args:
            ranks: of each rank, its micro-batches, `MicroBatch.on_host`.
            accumulate: what the loss of a micro-batch was divided by.
            settings: the run's configuration, as YAML.
        """
        return {
            "step": self.inputs.step,
            "loss": self.loss,
            "gradient_norm": self.norm,
            "consecutive_skipped_steps": self.row,
            "differs": self.differs,
            "exact_heads": self.inputs.exact_heads,
            "attends_exactly": self.inputs.attends_exactly,
            "ranks": ranks,
            "accumulate": accumulate,
            "settings": settings,
        }


def replay_path(folder: Path, step: int) -> Path:
    """The file of a step."""
    return folder / f"step={step}.replay{CHECKPOINT_SUFFIX}"


def read_failed_step(path: Path) -> dict[str, Any]:
    """The whole checkpoint, with a well-formed entry KEY; tensors stay on the disk until they are used.

    Raises:
        UserError: there is none, it is damaged, or it is another kind of file.
    """
    if not path.is_file():
        raise UserError(f"replay: no file {path}; expected numerics/step=N.replay{CHECKPOINT_SUFFIX} of a run")
    damage = damage_of(path)
    if damage is not None:
        raise UserError(f"replay: {path} is damaged: {damage}")
    checkpoint = read_checkpoint(path, "replay")
    found = checkpoint.get(KEY)
    empty = FailedStep(StepInputs(0), 0.0, 0.0).as_saved([], 1, "")
    if not isinstance(found, dict) or any(type(found.get(name)) is not type(value) for name, value in empty.items()):
        raise UserError(
            f"replay: {path} is a checkpoint without a step to replay; expected numerics/step=N.replay"
            f"{CHECKPOINT_SUFFIX} of a run that has ended with exit code 76"
        )
    return checkpoint
