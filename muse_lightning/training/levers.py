"""What to change when a step does not fit: the levers in their order, what each is predicted to save, and how long a
context then fits."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from muse_lightning.attention import Muse
from muse_lightning.training.memory import step_memory
from muse_lightning.training.module import LanguageModel

LOSS_CHUNK, MLP_TILES = 1024, 8
"""Where the levers of these names are pulled to: a chunk that still fills a GPU, and tiles of an eighth, beyond which
little is left to save."""
WORTHWHILE = 0.02
"""Of the peak: what saves less is no advice."""
USABLE = 0.95
"""Of a device's memory; the driver, libraries and the allocator's gaps take the rest."""
CLOSE = 0.02
"""Of the memory: a search ends when no more is left over, for the prediction is no better."""
TOKENS = 1024
"""Contexts are a multiple of so many, or of the attention's chunk."""


@dataclass(frozen=True)
class Setting:
    """A model and its batches, as one configuration has them.

    Attributes:
        model: only its options matter.
        batch_size, seq_len: sequences of a micro-batch on one device, and their tokens.
        accumulate: micro-batches of a step.
        precision: Lightning's name of it.
        said: what was changed last, as flags.
    """

    model: LanguageModel
    batch_size: int
    seq_len: int
    accumulate: int
    precision: str | int | None
    said: str = "as it is"

    def peak(self, seq_len: int | None = None) -> int:
        """Predicted bytes of a GPU, at this or another context."""
        return step_memory(
            self.model,
            batch_size=self.batch_size,
            seq_len=seq_len or self.seq_len,
            accumulate=self.accumulate,
            precision=self.precision,
        ).total


def levers(setting: Setting) -> Iterator[Setting]:
    """The setting with each lever pulled that is not pulled yet, one at a time.

    In order of what they cost, as measured (benchmarks/results/2026-11-29_h200_training-steps.md): nothing but smaller
    products (batch, chunk of the loss, 1 %); the forward pass of all but attention once more; that of attention, too
    (16 %). Then, of blocks that are computed again, the way to the host, which is hidden (none), and tiles, which
    compute the feed-forward network a third time (4 %).
    """
    if setting.batch_size > 1:
        said = f"data.batch_size=1 trainer.accumulate_grad_batches={setting.accumulate * setting.batch_size}"
        accumulate = setting.accumulate * setting.batch_size
        yield replace(setting, batch_size=1, accumulate=accumulate, said=said)
    for changes in _changes(setting.model):
        said = " ".join(f"model.{name}={str(value).lower()}" for name, value in changes.items())
        yield replace(setting, model=setting.model.twin(seq_len=None, **changes), said=said)


def _changes(model: LanguageModel) -> Iterator[dict[str, Any]]:
    if model.loss_chunk > LOSS_CHUNK:
        yield {"loss_chunk": LOSS_CHUNK}
    if model.recompute == "none":
        yield {"recompute": "keep_attention"}
    elif model.recompute_every > 1:
        yield {"recompute_every": 1}
    if model.recompute != "block":
        yield {"recompute": "block"}
    if model.recompute != "none" and not model.offload:
        yield {"offload": True}
    if model.mlp_tiles < MLP_TILES:
        yield {"mlp_tiles": MLP_TILES}


def next_lever(setting: Setting) -> str | None:
    """The first lever that saves something worth its while, as advice; None if none does."""
    before = setting.peak()
    for pulled in levers(setting):
        after = pulled.peak()
        if after < (1 - WORTHWHILE) * before:
            gib = 2**30
            return f"{pulled.said} (predicted peak {after / gib:.1f} GiB instead of {before / gib:.1f})"
    return None


def longest_contexts(setting: Setting, memory: int) -> Iterator[tuple[str, int]]:
    """What was pulled and the longest context that then fits, as it is and with one lever after the other.

    Args:
        setting: `seq_len` is where the search begins.
        memory: bytes of the device.
    Returns:
        The lever, as flags, and tokens; 0 if not even the shortest fits.
    """
    modules = setting.model.llama.modules()
    unit = max((module.options["chunk"] for module in modules if isinstance(module, Muse)), default=TOKENS)
    current: Setting | None = setting
    while current is not None:
        longest = _longest(current, int(USABLE * memory), unit)
        yield current.said, longest
        current = next(levers(replace(current, seq_len=max(longest, unit))), None)


def _longest(setting: Setting, budget: int, unit: int) -> int:
    """The largest multiple of `unit` whose peak is within the budget, to a fiftieth: the peak is nearly linear."""
    # Weights, gradients and at most two moments, with no token.
    fits, fitting_peak = 0, 4 * sum(parameter.nbytes for parameter in setting.model.parameters())
    too_long, guess = None, max(unit, setting.seq_len // unit * unit)
    while too_long is None or too_long - fits > unit:
        peak = setting.peak(guess)
        slope = (peak - fitting_peak) / (guess - fits)
        if peak > budget:
            too_long = guess
        else:
            fits, fitting_peak = guess, peak
            if peak > (1 - CLOSE) * budget:
                break
        wanted = fits + int((budget - fitting_peak) / max(slope, 1.0)) // unit * unit
        # Strictly between what fits and what does not, or this would never end.
        guess = max(fits + unit, wanted if too_long is None else min(wanted, too_long - unit))
    return fits
