"""The attention of a model in one line."""

from collections.abc import Mapping, Sequence

from muse_lightning.attention.base import AttentionStrategy
from muse_lightning.attention.partly_exact import PartlyExact


def describe_layers(strategies: Sequence[AttentionStrategy]) -> str:
    """What a reader of a report is told: classes with their `extra_repr`, and which layers have another than most.

    Args:
        strategies: one per layer, in order.
    Returns:
        For instance "Muse(chunk=2048, top_k=12), Dense in layers 0 and 15", or "Muse(chunk=2048, top_k=12), 8 of 32
        key-value heads exact".
    """
    layers: dict[str, list[int]] = {}
    partly = [strategy for strategy in strategies if isinstance(strategy, PartlyExact)]
    for layer, strategy in enumerate(strategies):
        strategy = strategy.others if isinstance(strategy, PartlyExact) else strategy
        arguments = " ".join(strategy.extra_repr().split())
        layers.setdefault(type(strategy).__name__ + (f"({arguments})" if arguments else ""), []).append(layer)
    (most, _), *others = sorted(layers.items(), key=lambda item: -len(item[1]))
    said = [most, *(f"{name} in {_numbers(found)}" for name, found in others)]
    if partly:
        exact, heads = (sum(numbers) for numbers in zip(*((len(s.heads), s.num_kv_heads) for s in partly), strict=True))
        said.append(f"{exact} of {heads} key-value heads exact")
    return ", ".join(said)


def heads_in_words(heads: Mapping[int, Sequence[int]]) -> str:
    """Key-value heads of layers that have some: "0: [1], 4: [0, 2]"."""
    return ", ".join(f"{layer}: {list(each)}" for layer, each in heads.items() if each)


def kind_of(strategy: AttentionStrategy) -> str:
    """A name under which equal strategies come together: the class, and how many heads are exact beside it."""
    if not isinstance(strategy, PartlyExact):
        return type(strategy).__name__
    count = len(strategy.heads)
    return f"{type(strategy.others).__name__} beside {count} exact key-value {'head' if count == 1 else 'heads'}"


def _numbers(layers: Sequence[int]) -> str:
    """Ascending numbers, three and more in a row as "4 to 9"."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    said = [text for run in runs for text in ([f"{run[0]} to {run[-1]}"] if len(run) > 2 else map(str, run))]
    listed = " and ".join(filter(None, [", ".join(said[:-1]), said[-1]]))
    return f"layer {listed}" if len(layers) == 1 else f"layers {listed}"
