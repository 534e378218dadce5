"""Attention without approximation: of a whole model, or of some of its layers."""

from collections.abc import Callable, Sequence
from functools import partial

from muse_lightning.attention.base import AttentionStrategy
from muse_lightning.attention.dense import Dense
from muse_lightning.attention.sliding_window import SlidingWindow
from muse_lightning.errors import UserError


def exact_attention(window: int | None) -> Callable[[int], AttentionStrategy]:
    """The attention of a model without approximation, made from the number of a layer.

    Args:
        window: tokens in sight, `LlamaConfig.sliding_window`; None: all.
    """
    return Dense if window is None else partial(SlidingWindow, window=window)


def is_exact(strategy: AttentionStrategy, window: int | None) -> bool:
    """Whether a strategy is what `exact_attention` makes. Not one that is derived from it, which need not be exact."""
    exact = Dense if window is None else SlidingWindow
    return type(strategy) is exact and getattr(strategy, "window", None) == window


def exact_in(
    layers: Sequence[int],
    attention: Callable[[int], AttentionStrategy],
    *,
    num_layers: int,
    window: int | None,
    option: str = "model.exact_layers",
) -> Callable[[int], AttentionStrategy]:
    """`attention` in all layers but some, which are exact.

    Args:
        layers: their numbers, from 0; negative ones count from the last layer, -1.
        num_layers: of the model.
        window: as in `exact_attention`.
        option: what a user calls `layers`.
    Raises:
        UserError: a layer that the model does not have.
    """
    numbers = layer_numbers(layers, num_layers, option)
    exact = exact_attention(window)
    return lambda layer: exact(layer) if layer in numbers else attention(layer)


def layer_numbers(layers: Sequence[int], num_layers: int, option: str) -> set[int]:
    """Numbers from 0 of layers of which some are counted from the last, -1. Raises as `exact_in`."""
    for layer in layers:
        if not -num_layers <= layer < num_layers:
            raise UserError(
                f"{option} names layer {layer}; accepted: 0 to {num_layers - 1}, or from the end -1 to {-num_layers}"
            )
    return {layer % num_layers for layer in layers}
