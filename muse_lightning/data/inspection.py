"""What a prepared dataset holds, as text: `muse data inspect`."""

import sys
from itertools import pairwise
from pathlib import Path

from muse_lightning.data.block_reader import read_block
from muse_lightning.data.card import CARD_NAME, TOKENIZER_NAME, DatasetCard, check_index, count_blocks, read_card
from muse_lightning.data.left_out import read_left_out
from muse_lightning.data.length_histogram import draw_lengths
from muse_lightning.data.tokenizer import SpecialTokens, Tokenizer, load_tokenizer
from muse_lightning.errors import UserError, reason_of

_SHOWN = 12


def inspect(
    dataset: Path,
    split: str = "train",
    block: int | None = None,
    seq_len: int = 2048,
    histogram: Path | None = None,
    left_out: str | None = None,
) -> None:
    """Show a dataset's card, decode one of its blocks with the documents in it, draw how long documents are; or
    list the files that are not in it.

    Args:
        dataset: Folder of the prepared dataset.
        split: The split that the block is taken from.
        block: Number of the block in stored order, from 0; null shows the card alone.
        seq_len: Context of the block in tokens.
        histogram: PNG file to draw the lengths of all documents in; null draws none.
        left_out: List, instead of all else, the files that were left out for this reason (minified, licence, duplicate
            and so on, as the card counts them), or for all of them (all): reason, repository and path.
    """
    card = read_card(dataset)
    if left_out is not None:
        list_left_out(dataset, card, left_out)
        return
    print("\n".join(describe_card(dataset, card)))
    if block is not None:
        print("\n".join(describe_block(dataset, card, split, block, seq_len)))
    if histogram is not None:
        draw_lengths(dataset, card, histogram)
        print(f"lengths of documents: {histogram}")


def describe_card(dataset: Path, card: DatasetCard) -> list[str]:
    """Lines of text about a dataset.

    Raises:
        UserError: the card lacks something that every dataset has.
    """
    try:
        return _card_lines(dataset, card)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise UserError(
            f"{dataset / CARD_NAME} is damaged: {type(error).__name__}: {reason_of(error)}; prepare the dataset again"
        ) from error


def _card_lines(dataset: Path, card: DatasetCard) -> list[str]:
    lines = [
        f"{dataset}: fingerprint {card.fingerprint[:12]}, format {card.format_version}",
        f"tokenizer {card.tokenizer['name']}: {card.tokenizer['vocab_size']:,} ids, stored as {card.dtype}",
    ]
    for source in card.sources:
        revisions = f", {len(source['revisions']):,} revisions" if source["revisions"] else ""
        lines.append(
            f"source {_source_text(source['identity'])}: {source['units']:,} units read, {source['documents']:,} "
            f"documents, {source['files']:,} files, {source['bytes']:,} bytes{revisions}"
        )
        lines += [f"  damaged: {_printable(unit)}: {why}" for unit, why in source["damaged"].items()]
    for name, split in card.splits.items():
        long_share = ", ".join(f">= {int(k) // 1024}k {v:.0%}" for k, v in split.long_document_share.items())
        lines.append(
            f"{name:>6}: {split.documents:,} documents, {split.tokens:,} tokens, {split.text_bytes:,} bytes of text "
            f"({split.text_bytes / split.tokens:.2f} per token), {len(split.chunks)} chunks; "
            f"tokens in documents of {long_share}"
        )
    skipped = ", ".join(f"{reason} {count:,}" for reason, count in card.skipped_files.items()) or "none"
    lines.append(f"files: {card.files:,} written; left out: {skipped}")
    for reason, gone in card.dropped_documents.items():
        lines.append(f"documents left out for {reason}: {gone['documents']:,} ({gone['bytes']:,} bytes)")
    lines.append(f"languages by bytes: {_shares(card.languages)}")
    lines.append(f"licences by bytes: {_shares(card.licences)}")
    thresholds = {**card.inputs["filters"], **card.inputs["limits"]}
    lines.append("made with: " + ", ".join(f"{key} {value}" for key, value in thresholds.items()))
    return lines


def list_left_out(dataset: Path, card: DatasetCard, reason: str) -> None:
    """Print a line for each file that was left out for a reason, or for all reasons, and say what has no names.

    Raises:
        UserError: no file was left out for that reason, or the dataset has no list.
    """
    wanted = {reason: card.skipped_files[reason]} if reason in card.skipped_files else {}
    wanted = dict(card.skipped_files) if reason == "all" else wanted
    if reason != "all" and not wanted:
        raise UserError(f"left_out: {reason!r} found; accepted: {', '.join(['all', *card.skipped_files])}")
    for entry in read_left_out(dataset):
        if entry.reason in wanted:
            wanted[entry.reason] -= 1
            print(f"{entry.reason}\t{_printable(entry.repository)}\t{_printable(entry.path)}")
    unnamed = ", ".join(f"{name} {count:,}" for name, count in wanted.items() if count > 0)
    if unnamed:
        print(f"counted by sources, which do not look at such files: {unnamed}", file=sys.stderr)


def describe_block(dataset: Path, card: DatasetCard, split: str, block: int, seq_len: int) -> list[str]:
    """Lines of text about one block: its place, its documents, its text with a line where each document begins.

    Raises:
        UserError: there is no such split or block, or its chunk is damaged.
    """
    entry = card.split(split)
    check_index(dataset / split, entry, card.dtype)
    count = count_blocks(entry, seq_len)
    if not 0 <= block < count:
        raise UserError(
            f"block: {block} found; split {split!r} has {count} blocks of {seq_len} + 1 tokens, numbered from 0"
        )
    tokenizer = _stored_tokenizer(dataset, card)
    found = read_block(dataset / split, entry, card.dtype, seq_len, block)
    tokens, starts = found.tokens.numpy(), found.starts.tolist()
    borders = sorted({0, *starts, len(tokens)})
    lines = [f"block {block} of {count} in {split}: {len(tokens)} tokens, {len(borders) - 1} documents"]
    for low, high in pairwise(borders):
        kind = "document begins" if low in starts else "document continued from the block before"
        lines.append(f"--- tokens {low} to {high - 1}: {kind} ---")
        lines.append(tokenizer.decode(tokens[low:high]))
    return lines


def _stored_tokenizer(dataset: Path, card: DatasetCard) -> Tokenizer:
    """The tokenizer kept with a dataset: its tokenizer.json, or bytes."""
    special_tokens = SpecialTokens(**card.tokenizer["special_tokens"])
    stored = dataset / TOKENIZER_NAME
    return load_tokenizer(str(stored) if stored.exists() else "bytes", special_tokens)


def _source_text(source: dict[str, object]) -> str:
    return f"{source['class']}({', '.join(f'{key}={value}' for key, value in source.items() if key != 'class')})"


def _shares(counts: dict[str, dict[str, int]]) -> str:
    """The largest shares of the bytes, and how many others there are."""
    total = sum(count["bytes"] for count in counts.values())
    largest = sorted(counts, key=lambda name: -counts[name]["bytes"])[:_SHOWN]
    shown = [f"{name} {counts[name]['bytes'] / total:.1%}" for name in largest]
    return ", ".join([*shown, f"{len(counts) - _SHOWN} more"] if len(counts) > _SHOWN else shown)


def _printable(name: str) -> str:
    """A name that any terminal takes, in one line: what is not UTF-8 or no character to print is replaced."""
    text = name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    return "".join(character if character.isprintable() else "\ufffd" for character in text)
