"""Sources to a prepared dataset. Built once, used again while its inputs are the same."""

import errno
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from muse_lightning.data.assembly import assemble
from muse_lightning.data.building import Preparation, build, skipped_text
from muse_lightning.data.card import CARD_NAME, FORMAT_VERSION, DatasetCard, read_card
from muse_lightning.data.documents import DocumentSource, SourceUnit
from muse_lightning.data.tokenizer import Tokenizer
from muse_lightning.errors import UserError
from muse_lightning.files import atomic_directory, exclusive_lock

# A disk or a quota that is full; a file system or a limit of the process that takes no longer file.
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def prepare_dataset(
    dataset: Path, sources: Sequence[DocumentSource], tokenizer: Tokenizer, tokenizer_name: str, how: Preparation
) -> DatasetCard:
    """Make the dataset, or use the one that is there when nothing that decides its content has changed.

    The units of the sources are listed at every call, and their stamps compared; contents are not read. A changed
    dataset is built anew, beside the old one, and then replaces it. What a build has finished lies in
    `.<name>.staging` beside the dataset until the build is complete; a later call goes on from there.

    Args:
        dataset: The folder of the dataset.
        sources: Where documents come from, in the order that breaks ties between equal names.
        tokenizer: Text to ids.
        tokenizer_name: As configured; noted in the card.
        how: Filters, limits, splits, order, seed.
    Raises:
        UserError: a source is missing or empty, nothing is left after the filters, a split would be empty, the disk is
            full, or the folder exists and is not a dataset.
    """
    if how.source_weights is not None and len(how.source_weights) != len(sources):
        raise UserError(
            f"data.source_weights: {len(how.source_weights)} found; one for each of the {len(sources)} data.sources "
            "expected"
        )
    units = [(number, unit) for number, source in enumerate(sources) for unit in source.units()]
    identities = [source.identity() for source in sources]
    inputs = {
        "sources": identities,
        "files": units_digest(units),
        "tokenizer": tokenizer.sha256,
        **{name: value for name, value in asdict(how).items() if name != "num_workers"},
        "format_version": FORMAT_VERSION,
    }
    staging = dataset.with_name(f".{dataset.name}.staging")
    if not _reasons_to_build(dataset, inputs) and not staging.exists():
        print(f"data: {dataset} is up to date", file=sys.stderr, flush=True)
        return read_card(dataset)
    with exclusive_lock(dataset):
        # Another process may have built it while this one waited for the lock.
        reasons = _reasons_to_build(dataset, inputs)
        if reasons:
            if dataset.exists():
                print(f"data: {dataset} is prepared again: {'; '.join(reasons)}", file=sys.stderr, flush=True)
            try:
                built = build(staging, units, identities, tokenizer, how)
                with atomic_directory(dataset) as folder:
                    card = assemble(folder, built, identities, tokenizer, tokenizer_name, inputs, how.num_workers)
            except OSError as error:
                if error.errno not in _NO_SPACE:
                    raise
                raise UserError(
                    f"data.dataset: no space is left beside {dataset} ({error.strerror}); make room and prepare again: "
                    f"what was finished is kept in {staging}, which may also be deleted"
                ) from error
            counts = ", ".join(f"{name} {split.documents:,}" for name, split in card.splits.items())
            print(
                f"data: documents: {counts}; {card.files:,} files{skipped_text(built.reading.skipped)}",
                file=sys.stderr,
                flush=True,
            )
        shutil.rmtree(staging, ignore_errors=True)
    return read_card(dataset)


def units_digest(units: Sequence[tuple[int, SourceUnit]]) -> str:
    """Hexadecimal SHA-256 over source, name and stamp of every unit: equal exactly when nothing that was listed
    changed."""
    digest = hashlib.sha256()
    for source, unit in units:
        # NUL is in no name and no stamp, so that no two lists run together into the same bytes.
        digest.update(f"\0{source}\0".encode() + os.fsencode(unit.name) + f"\0{unit.stamp}".encode())
    return digest.hexdigest()


def damaged_chunks(dataset: Path, card: DatasetCard) -> list[str]:
    """Chunk files that are missing or have another length than the card says; contents are not read."""
    damaged = []
    for name, split in card.splits.items():
        for chunk in split.chunks:
            path = dataset / name / chunk.filename
            if not path.is_file():
                damaged.append(f"{path} is missing")
            elif path.stat().st_size != chunk.size_bytes:
                damaged.append(f"{path} has {path.stat().st_size} bytes instead of {chunk.size_bytes}")
    return damaged


def _reasons_to_build(dataset: Path, inputs: dict[str, Any]) -> list[str]:
    """Why the dataset has to be built; empty when it can be used as it is."""
    if not dataset.exists():
        return ["it does not exist"]
    card_path = dataset / CARD_NAME
    if not card_path.exists():
        if dataset.is_dir() and not any(dataset.iterdir()):
            return ["it is empty"]
        raise UserError(f"data.dataset: {dataset} exists and is not a prepared dataset; give a new folder")
    try:
        old = json.loads(card_path.read_text())["inputs"]
        if old.get("format_version") != FORMAT_VERSION:
            return [_describe_change("format_version", old.get("format_version"), FORMAT_VERSION)]
        old_inputs = {key: old.get(key) for key in inputs}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return [f"its {CARD_NAME} is unreadable"]
    # Compared as JSON, so that a tuple and a list, or 0 and 0.0, are no difference.
    changed = [key for key, value in inputs.items() if old_inputs[key] != json.loads(json.dumps(value))]
    if changed:
        return [_describe_change(key, old_inputs[key], inputs[key]) for key in changed]
    return damaged_chunks(dataset, read_card(dataset))


def _describe_change(key: str, old: Any, new: Any) -> str:
    if key in ("files", "tokenizer"):  # digests
        return f"{key} changed"
    if isinstance(old, dict) and isinstance(new, dict):
        parts = [f"{key}.{name} {old.get(name)} -> {new.get(name)}" for name in new if old.get(name) != new.get(name)]
        return ", ".join(parts) or f"{key} changed"
    return f"{key} changed" if isinstance(new, list) else f"{key} {old} -> {new}"
