"""Which files and documents are prepared, in which order, split and shard: functions of names, sizes and a seed.

Every random choice is a hash of the seed and a name: equal on every machine, and mostly unchanged when a repository is
added.
"""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

import numpy as np

from muse_lightning.data.inventory import Texts
from muse_lightning.errors import UserError

FileOrder = Literal["shuffle", "path"]
SPLITS = ("train", "val", "test")
DROPPED = -1


@dataclass(frozen=True)
class Limits:
    """How much of the sources is used; None means all."""

    max_documents: int | None = None
    max_bytes: int | None = None
    max_document_bytes: int = 32 << 20
    min_document_tokens: int = 0
    long_document_tokens: int = 65536
    long_document_share: float | None = None

    def __post_init__(self) -> None:
        for name, least in (
            ("max_documents", 1),
            ("max_bytes", 1),
            ("max_document_bytes", 1),
            ("min_document_tokens", 0),
            ("long_document_tokens", 1),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"data.{name}: {value} found, at least {least} expected")
        share = self.long_document_share
        if share is not None and not 0 < share <= 1:
            raise UserError(f"data.long_document_share: {share} found, more than 0 and at most 1 expected")


def order_key(seed: int, *names: str) -> bytes:
    """A uniformly random sort key of an item, drawn by its names."""
    return hashlib.blake2b(b"\0".join([str(seed).encode(), *map(os.fsencode, names)]), digest_size=16).digest()


def seeded_order(keys: Sequence[bytes], *ties: np.ndarray) -> np.ndarray:
    """int64: the rows in the order of their keys; of equal keys in the order of `ties`, the first of them first."""
    halves = np.frombuffer(b"".join(keys), dtype=">u8").reshape(-1, 2).astype(np.uint64)
    return np.lexsort((*reversed(ties), halves[:, 1], halves[:, 0]))


def order_files(name: str, paths: Sequence[bytes], order: FileOrder, readme_first: bool, seed: int) -> list[int]:
    """The files of a document, as they are written: shuffled by the seed, or by path.

    Args:
        name: Of the document; two of them with the same paths are not shuffled alike.
        paths: Of its files.
        order: shuffle or path.
        readme_first: Whether the README that lies in the topmost folder goes first.
        seed: Of the shuffle.
    Returns:
        Indices of `paths`.
    """
    if order == "path":
        rows = sorted(range(len(paths)), key=lambda row: paths[row])
    else:
        rows = sorted(range(len(paths)), key=lambda row: order_key(seed, name, os.fsdecode(paths[row])))
    readmes = [row for row in rows if paths[row].rpartition(b"/")[2].lower().split(b".")[0] == b"readme"]
    if readme_first and readmes:
        first = min(readmes, key=lambda row: (paths[row].count(b"/"), paths[row]))
        rows.remove(first)
        rows.insert(0, first)
    return rows


def duplicates(digests: np.ndarray, ranks: np.ndarray) -> np.ndarray:
    """bool [files]: whether an equal content comes earlier.

    Args:
        digests: uint64 [files, 2], of the contents.
        ranks: [files]. Of equal files the one of the lowest rank stays; of equal ranks the first.
    """
    order = np.lexsort((ranks, digests[:, 1], digests[:, 0]))
    found = np.zeros(len(order), dtype=bool)
    found[order[1:]] = np.all(digests[order[1:]] == digests[order[:-1]], axis=1)
    return found


def cut_by_folder(paths: Sequence[bytes], sizes: Sequence[int], max_bytes: int) -> list[list[int]]:
    """Cut a repository into parts of at most `max_bytes`, keeping folders together where they fit.

    Sub-folders that are too large are cut in turn; neighbours in path order are put together as long as they fit. A
    single larger file stays a part of its own.

    Returns:
        Indices of `paths` for each part.
    """
    components = [path.split(b"/") for path in paths]
    parts: list[list[int]] = []
    current: list[int] = []
    current_size = 0
    # Groups still to be placed, last first: (files, depth of the path component at which to cut them).
    pending = [(sorted(range(len(paths)), key=lambda row: components[row]), 0)]
    while pending:
        group, depth = pending.pop()
        size = sum(sizes[row] for row in group)
        if size > max_bytes and len(group) > 1:
            pending.extend((child, depth + 1) for child in reversed(_children(group, components, depth)))
            continue
        if current and current_size + size > max_bytes:
            parts.append(current)
            current, current_size = [], 0
        current += group
        current_size += size
    return [*parts, current] if current else parts


def _children(rows: list[int], components: Sequence[Sequence[bytes]], depth: int) -> list[list[int]]:
    """Files grouped by the sub-folder they lie in at `depth`; a file directly in the folder is a group of its own."""
    groups: list[list[int]] = []
    last_folder: bytes | None = None
    for row in rows:
        folder = components[row][depth] if len(components[row]) > depth + 1 else None
        if folder is not None and folder == last_folder:
            groups[-1].append(row)
        else:
            groups.append([row])
        last_folder = folder
    return groups


def within(sizes: np.ndarray, max_bytes: float | None, max_count: int | None = None) -> np.ndarray:
    """bool: each item, in the given order, that still fits into what is left of the bytes, until there are enough."""
    kept = np.zeros(len(sizes), dtype=bool)
    left = np.inf if max_bytes is None else max_bytes
    count = 0
    for row, size in enumerate(sizes.tolist()):
        if count == max_count:
            break
        if size <= left:
            kept[row] = True
            left -= size
            count += 1
    return kept


def source_budgets(available: np.ndarray, weights: Sequence[float], max_bytes: int | None) -> np.ndarray:
    """Bytes to use of each source: as many as keep the weights with no byte used twice.

    Args:
        available: Bytes that each source has.
        weights: Shares of the sources in the bytes, in any unit; 0 leaves a source out.
        max_bytes: Of all sources together.
    Raises:
        UserError: a source that has a weight has no bytes.
    """
    shares = np.asarray(weights, dtype=np.float64) / sum(weights)
    for number in np.flatnonzero((shares > 0) & (available == 0)).tolist():
        raise UserError(
            f"data.source_weights[{number}]: {weights[number]} found, but nothing is left of that source; "
            "set it to 0, or loosen data.filters"
        )
    total = np.min(available[shares > 0] / shares[shares > 0])
    # A byte more than the exact share: what is exactly in proportion must not be lost to rounding.
    return shares * (total if max_bytes is None else min(total, max_bytes)) + 1


def is_held_out(names: Texts, patterns: Sequence[str]) -> np.ndarray:
    """bool [names]: which match one of the patterns, as `fnmatch` does, with attention to case."""
    if not patterns:
        return np.zeros(len(names), dtype=bool)
    return np.array([any(fnmatchcase(name, pattern) for pattern in patterns) for name in names], dtype=bool)


def split_names(
    names: Texts, sizes: np.ndarray, held_out: np.ndarray, fractions: dict[str, float], seed: int
) -> np.ndarray:
    """Share repositories out over the splits.

    What is held out is `test`. The others are drawn in seeded order: `test` and `val` each take every one that needs at
    most half of what is left of their fraction of all bytes, so that no single repository is most of a split; at least
    one (the smallest, if none fits). The rest is `train`.

    Args:
        names: Of the repositories.
        sizes: int64 [names]. Bytes of each; those of 0 bytes are in no split.
        held_out: bool [names].
        fractions: Of the splits `val` and `test`; 0 leaves a split out.
        seed: Of the order.
    Returns:
        int8 [names]: index of SPLITS, or DROPPED.
    Raises:
        UserError: there are fewer repositories than splits asked for.
    """
    result = np.where(held_out, SPLITS.index("test"), SPLITS.index("train")).astype(np.int8)
    result[sizes == 0] = DROPPED
    free = np.flatnonzero(~held_out & (sizes > 0))
    has_test = bool(np.any(held_out & (sizes > 0)))
    wanted = [s for s in ("test", "val") if fractions.get(s, 0) > 0 and not (s == "test" and has_test)]
    if len(free) < 1 + len(wanted):
        fields = " and ".join(f"data.{split}_fraction" for split in wanted)
        cure = f"set {fields} to 0" if wanted else "hold out fewer in data.held_out"
        raise UserError(
            f"{len(free)} repositories cannot be split into {' and '.join(['train', *wanted])}; "
            f"give more repositories, raise data.max_bytes or data.max_documents where they are set, or {cure}"
        )
    remaining = free[seeded_order([order_key(seed, "split", names[row]) for row in free.tolist()])].tolist()
    for index, split in enumerate(wanted):
        # One repository must be left for each split still to come, and one for train.
        room = len(remaining) - (len(wanted) - index)
        left = fractions[split] * float(sizes.sum())
        taken: list[int] = []
        for row in remaining:
            if len(taken) < room and 2 * sizes[row] <= left:
                taken.append(row)
                left -= float(sizes[row])
        taken = taken or [min(remaining, key=lambda row: int(sizes[row]))]
        result[taken] = SPLITS.index(split)
        chosen = set(taken)
        remaining = [row for row in remaining if row not in chosen]
    return result


def keep_long_share(tokens: np.ndarray, long_tokens: int, share: float) -> np.ndarray:
    """bool: which documents stay so that at least `share` of the tokens lie in documents of `long_tokens` or more.

    Of the shorter ones, each in the given order that still fits stays.

    Raises:
        UserError: no document is that long.
    """
    is_long = tokens >= long_tokens
    long_total = int(tokens[is_long].sum())
    if not long_total:
        raise UserError(
            f"data.long_document_share: {share} found, but no document of train has {long_tokens} tokens; "
            "lower data.long_document_tokens, or give larger repositories"
        )
    kept = is_long.copy()
    kept[~is_long] = within(tokens[~is_long], long_total * (1 - share) / share)
    return kept


def cut_shards(sizes: np.ndarray, shard_bytes: int) -> np.ndarray:
    """int64 [documents]: the shard of each, contiguous and about `shard_bytes` long, as equal as whole documents
    allow."""
    total = int(sizes.sum())
    count = max(1, round(total / shard_bytes))
    middles = np.cumsum(sizes) - sizes + sizes // 2
    shards = np.minimum(count - 1, middles * count // max(total, 1))
    return np.unique(shards, return_inverse=True)[1]
