"""Needles: lines of foreign text that are hidden in a document and asked for at its end."""

from itertools import pairwise

import torch
from torch import Tensor

_TRIES = 100
_MIN_DISTINCT = 0.25


def longest_document(cu_seqlens: Tensor | None, row: int, seq_len: int) -> slice:
    """Where in a row its longest document lies; the whole row where documents are not told apart.

    Args:
        cu_seqlens: int32 [S + 1], offsets in the flattened batch, or None.
    """
    if cu_seqlens is None:
        return slice(0, seq_len)
    offsets = cu_seqlens.tolist()
    inside = [offset - row * seq_len for offset in offsets if row * seq_len <= offset <= (row + 1) * seq_len]
    length, start = max((end - start, -start) for start, end in pairwise(inside))
    return slice(-start, -start + length)


def choose_needle(
    pool: list[Tensor], haystack: Tensor, length: int, generator: torch.Generator, is_text: Tensor | None = None
) -> Tensor | None:
    """A span of tokens to hide.

    Neither half of it occurs in the haystack, so that only the needle itself can answer; at least a quarter of its
    tokens are distinct, so that it is no run of spaces.

    Args:
        pool: 1-D texts to take it from, on the CPU.
        haystack: int64 [T] on the CPU.
        length: of the needle, tokens.
        generator: source of randomness, on the CPU.
        is_text: bool [V]: ids that a needle may hold; None: all.
    Returns:
        int64 [length], or None where a hundred tries found none.
    """
    starts = torch.tensor([max(0, len(text) - length + 1) for text in pool])
    total = int(starts.sum())
    for _ in range(_TRIES if total else 0):
        index = int(torch.randint(total, (1,), generator=generator))
        which = int(torch.searchsorted(starts.cumsum(0), index, right=True))
        start = index - int(starts[:which].sum())
        needle = pool[which][start : start + length]
        if is_text is not None and not is_text[needle].all():
            continue
        if len(needle.unique()) < _MIN_DISTINCT * length:
            continue
        if not occurs(needle[: length // 2], haystack) and not occurs(needle[length // 2 :], haystack):
            return needle
    return None


def occurs(part: Tensor, text: Tensor) -> bool:
    """Whether the tokens `part` [n] occur one after the other in `text` [T]."""
    return len(text) >= len(part) and bool((text.unfold(0, len(part), 1) == part).all(1).any())


def hide(haystack: Tensor, needle: Tensor, depth: float | None) -> Tensor:
    """A haystack with a needle in it, and the needle once more at its end: the cue, its first half, and the answer.

    Args:
        haystack: [T], of which as many tokens as are needed are dropped at its end. T at least 2 * n.
        needle: [n].
        depth: 0 hides it at the start, 1 right before the cue; None leaves it out: the control.
    Returns:
        [T]
    """
    if depth is None:
        return torch.cat([haystack[: len(haystack) - len(needle)], needle])
    kept = haystack[: len(haystack) - 2 * len(needle)]
    start = round(depth * len(kept))
    return torch.cat([kept[:start], needle, kept[start:], needle])
