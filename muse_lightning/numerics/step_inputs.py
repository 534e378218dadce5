"""What a step was computed from, besides the weights: its batches and the states of the random generators."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from muse_lightning.checkpoints.random_state import random_state


@dataclass
class MicroBatch:
    """One batch of a step that accumulates several."""

    batch: Mapping[str, Tensor]
    """On the device; a reference, not a copy."""
    batch_idx: int
    random_state: dict[str, Any] = field(default_factory=random_state)
    """Before its forward pass."""

    def on_host(self) -> dict[str, Any]:
        """As a file holds it."""
        return {
            "batch": {name: tensor.cpu() for name, tensor in self.batch.items() if isinstance(tensor, Tensor)},
            "random_state": self.random_state,
        }


@dataclass
class StepInputs:
    """All micro-batches of one rank in one optimizer step."""

    step: int
    """From 1."""
    micro_batches: list[MicroBatch] = field(default_factory=list)
    exact_heads: dict[int, list[int]] = field(default_factory=dict)
    """`LanguageModel.chosen_heads`."""
    attends_exactly: bool = False
    """`LanguageModel.attends_exactly`: a callback may have made every layer exact."""
