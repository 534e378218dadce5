"""Blocks to the batch that a model sees.

Legend: B blocks (batch_size), T context (seq_len), S sequences of all rows together.
"""

from collections.abc import Sequence
from typing import NotRequired, TypedDict

import torch

from muse_lightning.data.block_reader import Block
from muse_lightning.data.ledger import batch_record

IGNORED_LABEL = -100
"""A label that is none."""
_SMALLEST_CU_SEQLENS = 64


class Batch(TypedDict):
    """One batch."""

    input_ids: torch.Tensor
    """int64 [B, T]."""
    labels: torch.Tensor
    """int64 [B, T]: the next token of each input; -100 where that is a document's first token."""
    cu_seqlens: NotRequired[torch.Tensor]
    """int32 [power of two, at least 64]: where sequences begin in the flattened B * T inputs (every row and every
    document), then B * T repeated. Absent when documents are not masked from each other."""
    record: NotRequired[str]
    """What the ledger notes of it, `ledger.batch_record`; in training only. Text, so that it stays on the host."""


class Collate:
    """Blocks to a batch. A class, not a closure: data workers must be able to receive it by pickle."""

    def __init__(self, document_mask: bool, with_record: bool = False) -> None:
        """
        Args:
            document_mask: Whether batches have `cu_seqlens`.
            with_record: Whether they have a `record`.
        """
        self.document_mask = document_mask
        self.with_record = with_record

    def __call__(self, blocks: Sequence[Block]) -> Batch:
        tokens = torch.stack([block.tokens for block in blocks]).to(torch.int64)  # [B, T + 1]
        labels = tokens[:, 1:].clone()
        for row, block in enumerate(blocks):
            starts = block.starts[block.starts > 0]
            labels[row, starts - 1] = IGNORED_LABEL
        batch = Batch(input_ids=tokens[:, :-1].contiguous(), labels=labels)
        if self.document_mask:
            batch["cu_seqlens"] = cumulative_lengths([block.starts for block in blocks], tokens.shape[1] - 1)
        if self.with_record:
            batch["record"] = batch_record(blocks)
        return batch


def cumulative_lengths(starts: Sequence[torch.Tensor], seq_len: int) -> torch.Tensor:
    """Sequence starts over flattened rows.

    Args:
        starts: Per row, int64: the positions at which documents begin; `seq_len` itself (the last label's place) is no
            input.
        seq_len: Inputs per row.
    Returns:
        int32: 0, every later row start and document start, rows * seq_len, and that repeated until the length is a
        power of two of at least 64. Few different lengths: compiled kernels see few shapes.
    """
    pieces = []
    for row, positions in enumerate(starts):
        inside = positions[(positions > 0) & (positions < seq_len)]
        pieces.append(torch.cat([inside.new_zeros(1), inside]) + row * seq_len)
    begins = torch.cat(pieces)
    length = max(_SMALLEST_CU_SEQLENS, 1 << len(begins).bit_length())
    result = torch.full((length,), len(starts) * seq_len, dtype=torch.int32)
    result[: len(begins)] = begins
    return result


def cut_documents(batch: Batch, length: int) -> torch.Tensor:
    """The `cu_seqlens` of a batch, as `Batch` has it, with every row cut at multiples of `length` tokens too; without
    waiting for the device."""
    rows, seq_len = batch["input_ids"].shape
    index = torch.arange(rows * seq_len, dtype=torch.int32, device=batch["input_ids"].device)
    return cut_at(batch, index.view(rows, seq_len)[:, ::length].flatten())


def cut_at(batch: Batch, offsets: torch.Tensor) -> torch.Tensor:
    """The `cu_seqlens` of a batch, as `Batch` has it, in which documents begin at `offsets`, integers [M] into the
    flattened batch, too; without waiting for the device."""
    rows, seq_len = batch["input_ids"].shape
    ends = torch.arange(rows + 1, dtype=torch.int32, device=offsets.device) * seq_len
    found = [ends, offsets.to(torch.int32)] + ([batch["cu_seqlens"]] if "cu_seqlens" in batch else [])
    starts = torch.cat(found).sort().values
    # Of several that are equal, all but the first become padding.
    starts[1:] = torch.where(starts[1:] == starts[:-1], ends[-1], starts[1:])
    padding = max(_SMALLEST_CU_SEQLENS, 1 << (len(starts) - 1).bit_length()) - len(starts)
    return torch.cat([starts.sort().values, ends[-1:].expand(padding)])


def to_device(batch: Batch, device: torch.device) -> Batch:
    """A copy of a batch's tensors on a device."""
    moved = Batch(input_ids=batch["input_ids"].to(device), labels=batch["labels"].to(device))
    if "cu_seqlens" in batch:
        moved["cu_seqlens"] = batch["cu_seqlens"].to(device)
    return moved


def document_lengths(rows: int, seq_len: int, cu_seqlens: torch.Tensor | None) -> list[int]:
    """Tokens of each document of a batch [rows, seq_len], as it is attended; reads cu_seqlens on the host."""
    if cu_seqlens is None:
        return [seq_len] * rows
    return [length for length in cu_seqlens.diff().tolist() if length]
