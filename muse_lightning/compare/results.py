"""What a comparison found, as plain records; the cheapest setting that keeps the loss."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from muse_lightning.compare.losses import Losses
from muse_lightning.compare.settings import Setting


@dataclass(frozen=True)
class Found:
    """Found for one setting.

    Attributes:
        rise: Of the mean loss over exact attention's on the same blocks, nats, and its standard error over blocks (None
            for a single one).
        errors: Relative squared error of attention by layer and head; None where it is not measured.
        mass: By layer and head, shares of softmax mass near, in retrieved keys and in summaries.
        gradient_cosine: Of the loss's gradient with that under exact attention.
        pairs: Query-key pairs that training works on, over exact attention's.
        attention_ms: Forward and backward pass of a layer's attention, on average.
        forward_ms: Forward pass of the model, one row.
    """

    setting: Setting
    losses: Losses
    rise: tuple[float, float | None]
    pairs: float
    errors: Sequence[Sequence[float]] | None = None
    mass: Sequence[Sequence[Sequence[float]]] | None = None
    gradient_cosine: float | None = None
    attention_ms: float | None = None
    forward_ms: float | None = None

    @property
    def mean_error(self) -> float | None:
        """Mean over layers and heads."""
        return _mean(self.errors)

    @property
    def mean_mass(self) -> tuple[float, float, float] | None:
        """Mean over layers and heads."""
        if self.mass is None:
            return None
        near, retrieved, summaries = (_mean([[head[i] for head in layer] for layer in self.mass]) for i in range(3))
        assert near is not None
        assert retrieved is not None
        assert summaries is not None
        return near, retrieved, summaries

    @property
    def highest_rise(self) -> float:
        """The rise and two standard errors."""
        rise, error = self.rise
        return rise + 2 * (error or 0.0)

    @property
    def cost(self) -> float:
        """Milliseconds where they were measured, else pairs."""
        return self.pairs if self.attention_ms is None else self.attention_ms

    @property
    def is_exact(self) -> bool:
        """Whether it did nothing but exact attention on these blocks."""
        return self.pairs == 1.0

    def record(self) -> dict[str, Any]:
        """For JSON."""
        rise, error = self.rise
        return {
            "name": self.setting.name,
            "attention": self.setting.recipe,
            "exact_layers": list(self.setting.exact_layers),
            "exact_heads": self.setting.exact_heads,
            "exact_heads_by_layer": {str(layer): list(heads) for layer, heads in self.setting.heads.items() if heads},
            "is_swept": self.setting.is_swept,
            "loss": self.losses.mean,
            "loss_rise": rise,
            "loss_rise_standard_error": error,
            "bits_per_byte": self.losses.bits_per_byte,
            "loss_by_tokens_in_sight": {
                str(2**i): loss for i, loss in enumerate(self.losses.by_context) if not math.isnan(loss)
            },
            "nats_of_blocks": list(self.losses.nats),
            "relative_squared_error": _finite(self.mean_error),
            "relative_squared_error_by_layer_and_head": self.errors and [list(map(_finite, e)) for e in self.errors],
            "mass_near_retrieved_summaries": self.mean_mass,
            "mass_by_layer_and_head": self.mass,
            "gradient_cosine": _finite(self.gradient_cosine),
            "pairs_over_exact": self.pairs,
            "attention_forward_backward_ms": self.attention_ms,
            "model_forward_ms": self.forward_ms,
        }


def cheapest(found: Sequence[Found], max_loss_increase: float) -> Found | None:
    """The cheapest setting of MuSe, of those that were not exact attention on these blocks, whose loss, two standard
    errors included, rises by no more; None if each rises more. Of two equally cheap ones the one that rises less."""
    fitting = [each for each in found if is_muse(each) and not each.is_exact and each.highest_rise <= max_loss_increase]
    return min(fitting, key=lambda each: (each.cost, each.rise[0]), default=None)


def overlay(chosen: Found, header: Mapping[str, Any]) -> str:
    """A recipe overlay that trains with a setting."""
    rise, error = chosen.rise
    spread = "" if error is None else f" (standard error {error:.4f})"
    lines = [
        "# The cheapest MuSe setting found for this model; the last --config of a recipe.",
        f"#   {header['command']}",
        f"# Loss {chosen.losses.mean:.4f}, {rise:+.4f}{spread} against exact attention, at {header['seq_len']} tokens.",
    ]
    model = {
        "attention": chosen.setting.recipe,
        "exact_layers": list(chosen.setting.exact_layers),
        "exact_heads": chosen.setting.exact_heads,
    }
    return "\n".join(lines) + "\n" + yaml.safe_dump({"model": model}, sort_keys=False)


def to_json(header: Mapping[str, Any], found: Sequence[Found], recommended: Found | None) -> str:
    """The content of compare.json."""
    content = {
        **header,
        "recommended": None if recommended is None else recommended.setting.name,
        "settings": [each.record() for each in found],
    }
    return json.dumps(content, indent=1, default=str) + "\n"


def is_muse(found: Found) -> bool:
    """Whether it is a setting of MuSe, not of one of its baselines."""
    return isinstance(found.setting.recipe, dict) and found.setting.recipe["class_path"] == "Muse"


def _finite(value: float | None) -> float | None:
    """JSON has no nan."""
    return value if value is None or math.isfinite(value) else None


def _mean(rows: Sequence[Sequence[float]] | None) -> float | None:
    return None if rows is None else sum(map(sum, rows)) / sum(map(len, rows))
