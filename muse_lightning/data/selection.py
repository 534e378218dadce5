"""Which listed documents are prepared, in which order, in which split and shard. Pure functions of the listing and a
seed.

Every random choice is a hash of the seed and a name: equal on every machine, and mostly unchanged when a repository is
added.
"""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from muse_lightning.data.documents import Document, SourceFile, cut_by_folder
from muse_lightning.data.filters import Filters
from muse_lightning.errors import UserError

FileOrder = Literal["shuffle", "path"]
SPLITS = ("train", "val", "test")


def order_key(seed: int, *names: str) -> bytes:
    """A uniformly random sort key of an item, drawn by its names."""
    return hashlib.blake2b(b"\0".join([str(seed).encode(), *map(os.fsencode, names)]), digest_size=16).digest()


def order_files(document: Document, order: FileOrder, seed: int) -> list[SourceFile]:
    """The files of a document as they are written: shuffled by the seed, or by path."""
    if order == "path":
        return sorted(document.files, key=lambda file: os.fsencode(file.path))
    return sorted(document.files, key=lambda file: order_key(seed, document.name, file.path))


@dataclass(frozen=True)
class Limits:
    """How much of the sources is used; None means all."""

    max_documents: int | None = None
    max_bytes: int | None = None
    max_document_bytes: int = 32 << 20

    def __post_init__(self) -> None:
        for name in ("max_documents", "max_bytes", "max_document_bytes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"data.{name}: {value} found, at least 1 expected")


def choose_documents(documents: Sequence[Document], limits: Limits, filters: Filters, seed: int) -> list[Document]:
    """The documents to use, in seeded order.

    Huge repositories are cut first. Then documents are taken in seeded order, each one that still fits into what is
    left of `max_bytes`, until there are `max_documents`. Sizes are those of the files that can pass the filters by
    name and size.
    """
    parts: list[Document] = []
    for document in documents:
        skipped = dict(document.skipped)
        kept = []
        for file in document.files:
            reason = filters.rejects_listed(file)
            if reason is None:
                kept.append(file)
            else:
                skipped[reason] = skipped.get(reason, 0) + 1
        parts += cut_by_folder(Document(document.name, tuple(kept), skipped=skipped), limits.max_document_bytes)
    # sorted() is stable: equal names of two sources stay in the order of the sources.
    parts = sorted(parts, key=lambda part: order_key(seed, part.name, part.part))
    chosen: list[Document] = []
    total = 0
    for part in parts:
        if limits.max_documents is not None and len(chosen) == limits.max_documents:
            break
        if limits.max_bytes is None or total + part.size <= limits.max_bytes:
            chosen.append(part)
            total += part.size
    return chosen


def split_documents(documents: Sequence[Document], fractions: dict[str, float], seed: int) -> dict[str, list[Document]]:
    """Share documents out over the splits; all documents of one repository name go to the same split.

    Repositories are drawn in seeded order: `test` and `val` each take every one that needs at most half of what is left
    of their fraction of all listed bytes, so that no single repository is most of a split; at least one (the smallest,
    if none fits). The rest is `train`.

    Args:
        documents: In the order that each split keeps.
        fractions: Of the splits `val` and `test`; 0 leaves a split out.
    Raises:
        UserError: there are fewer repositories than splits asked for.
    """
    sizes: dict[str, int] = {}
    for document in documents:
        sizes[document.name] = sizes.get(document.name, 0) + document.size
    wanted = [split for split in ("test", "val") if fractions.get(split, 0) > 0]
    if len(sizes) < 1 + len(wanted):
        names = " and ".join(f"data.{split}_fraction" for split in wanted)
        raise UserError(
            f"{len(sizes)} repositories cannot be split into train and {' and '.join(wanted)}; "
            f"give more repositories, raise the limits, or set {names} to 0"
        )
    total = sum(sizes.values())
    remaining = sorted(sizes, key=lambda name: order_key(seed, "split", name))
    split_of: dict[str, str] = {}
    for index, split in enumerate(wanted):
        # One repository must be left for each split still to come, and one for train.
        room = len(remaining) - (len(wanted) - index)
        left = fractions[split] * total
        taken: list[str] = []
        for name in remaining:
            if len(taken) < room and 2 * sizes[name] <= left:
                taken.append(name)
                left -= sizes[name]
        for name in taken or [min(remaining, key=lambda name: sizes[name])]:
            split_of[name] = split
            remaining.remove(name)
    result: dict[str, list[Document]] = {split: [] for split in SPLITS}
    for document in documents:
        result[split_of.get(document.name, "train")].append(document)
    return {split: chosen for split, chosen in result.items() if chosen}


def cut_shards(documents: Sequence[Document], shard_bytes: int) -> list[list[Document]]:
    """Cut a list of documents into shards of about `shard_bytes` listed bytes, as equal as whole documents allow."""
    total = sum(document.size for document in documents)
    count = max(1, round(total / shard_bytes))
    shards: list[list[Document]] = [[] for _ in range(count)]
    position = 0
    for document in documents:
        middle = position + document.size // 2
        shards[min(count - 1, middle * count // max(total, 1))].append(document)
        position += document.size
    return [shard for shard in shards if shard]
