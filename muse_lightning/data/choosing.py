"""From all that was read to the documents that are encoded: duplicates, huge repositories, weights, limits."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from muse_lightning.data.inventory import Columns, Inventory, Texts
from muse_lightning.data.selection import (
    Limits,
    cut_by_folder,
    duplicates,
    is_held_out,
    order_key,
    seeded_order,
    source_budgets,
    within,
)


@dataclass(frozen=True)
class Documents:
    """The documents to encode, in seeded order.

    Attributes:
        files: Columns as in Inventory, sorted by `document`: the row of a document here.
        name: [documents] Number of the name in `names`.
        source: [documents] Number of the source.
        sizes: int64 [documents]. Bytes of the files.
        held_out: bool [names].
        languages, licences: What the columns of that name number.
        skipped: Files left out, by reason.
        repeated: Columns of the duplicates among them; `name` instead of `document`.
        dropped: Documents and bytes left out, by reason.
    """

    files: Columns
    name: np.ndarray
    source: np.ndarray
    sizes: np.ndarray
    names: Texts
    held_out: np.ndarray
    languages: Sequence[str]
    licences: Sequence[str]
    skipped: Counter[str]
    repeated: Columns
    dropped: dict[str, dict[str, int]]

    def __len__(self) -> int:
        return len(self.name)

    def borders(self) -> np.ndarray:
        """int64 [documents + 1]: where the files of each document begin."""
        return np.searchsorted(self.files["document"], np.arange(len(self) + 1))


def choose_documents(
    inventory: Inventory,
    limits: Limits,
    *,
    weights: Sequence[float] | None,
    held_out: Sequence[str],
    deduplicate: bool,
    seed: int,
) -> Documents:
    """Choose in this order: one of each content (a held-out repository's, else the first in seeded order); cut huge
    repositories by folder; for weights, the most bytes of each source that keep them; the limits.

    Held-out repositories count for no weight and no limit.

    Raises:
        UserError: a source that has a weight has nothing left.
    """
    files = inventory.files
    names, is_out = inventory.names, is_held_out(inventory.names, held_out)
    name, source = inventory.document_name, inventory.document_source
    skipped: Counter[str] = Counter()
    repeated = np.zeros(len(files["document"]), dtype=bool)
    if deduplicate:
        order = seeded_order([order_key(seed, names[row], "") for row in name], source)
        ranks = np.empty(len(order), dtype=np.int64)
        ranks[order] = np.arange(len(order))
        ranks[is_out[name]] -= len(order)
        repeated = duplicates(files["digest"], ranks[files["document"]])
        skipped["duplicate"] = int(repeated.sum())
    again = {column: files[column][repeated] for column in ("pack", "offset", "path_bytes")}
    again["name"] = name[files["document"][repeated]]
    files = _take(files, ~repeated)
    files = {column: values for column, values in files.items() if column != "digest"}
    files, name, source, parts = _cut(inventory, files, name, source, limits.max_document_bytes)
    order = seeded_order(
        [order_key(seed, names[row], parts.get(number, "")) for number, row in enumerate(name)], source
    )
    sizes = np.zeros(len(name), dtype=np.int64)
    np.add.at(sizes, files["document"], files["size"].astype(np.int64))
    order = order[sizes[order] > 0]
    name, source, sizes = name[order], source[order], sizes[order]
    is_kept = np.ones(len(order), dtype=bool)
    dropped: dict[str, dict[str, int]] = {}

    def keep(reason: str, mask: np.ndarray) -> None:
        gone = is_kept & ~mask & ~is_out[name]
        if gone.any():
            dropped[reason] = {"documents": int(gone.sum()), "bytes": int(sizes[gone].sum())}
            is_kept[gone] = False

    free = ~is_out[name]
    if weights is not None:
        available = np.array([sizes[free & (source == number)].sum() for number in range(len(weights))])
        mask = np.zeros(len(order), dtype=bool)
        for number, budget in enumerate(source_budgets(available, weights, limits.max_bytes)):
            rows = np.flatnonzero(free & (source == number))
            mask[rows[within(sizes[rows], budget)]] = True
        keep("source_weights", mask)
    max_bytes = limits.max_bytes if weights is None else None
    if max_bytes is not None or limits.max_documents is not None:
        rows = np.flatnonzero(free & is_kept)
        mask = np.zeros(len(order), dtype=bool)
        mask[rows[within(sizes[rows], max_bytes, limits.max_documents)]] = True
        keep("limits", mask)
    order, name, source, sizes = order[is_kept], name[is_kept], source[is_kept], sizes[is_kept]
    rank = np.full(int(files["document"].max(initial=0)) + 1, -1, dtype=np.int64)
    rank[order] = np.arange(len(order))
    files = {**files, "document": rank[files["document"]]}
    files = _take(files, files["document"] >= 0)
    files = _take(files, np.argsort(files["document"], kind="stable"))
    return Documents(
        files, name, source, sizes, names, is_out, inventory.languages, inventory.licences, skipped, again, dropped
    )


def _cut(
    inventory: Inventory, files: Columns, name: np.ndarray, source: np.ndarray, max_bytes: int
) -> tuple[Columns, np.ndarray, np.ndarray, dict[int, str]]:
    """Cut documents of more than `max_bytes`. Their first parts keep their rows, the others are added behind.

    Returns:
        The files, the name and source of each document, and for each part its first path.
    """
    sizes = np.zeros(len(name), dtype=np.int64)
    np.add.at(sizes, files["document"], files["size"].astype(np.int64))
    huge = np.flatnonzero(sizes > max_bytes)
    document = files["document"].astype(np.int64)
    parts: dict[int, str] = {}
    more: list[int] = []
    for number in huge.tolist():
        rows = np.flatnonzero(document == number)
        paths = read_paths([pack.content for pack in inventory.packs], _take(files, rows))
        for index, part in enumerate(cut_by_folder(paths, files["size"][rows].tolist(), max_bytes)):
            target = number if index == 0 else len(name) + len(more)
            if index:
                more.append(number)
            document[rows[part]] = target
            parts[target] = paths[part[0]].decode("utf-8", "surrogateescape")
    again = np.concatenate([np.arange(len(name)), np.array(more, dtype=np.int64)])
    return {**files, "document": document}, name[again], source[again], parts


def read_paths(contents: Sequence[Path], files: Columns) -> list[bytes]:
    """Paths of some files, from the packs' files."""
    paths = []
    opened: dict[int, np.ndarray] = {}
    for pack, offset, length in zip(
        files["pack"].tolist(), files["offset"].tolist(), files["path_bytes"].tolist(), strict=True
    ):
        if pack not in opened:
            opened[pack] = np.memmap(contents[pack], np.uint8, mode="r")
        paths.append(opened[pack][offset : offset + length].tobytes())
    return paths


def _take(files: Columns, rows: np.ndarray) -> Columns:
    return {column: values[rows] for column, values in files.items()}
