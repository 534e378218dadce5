"""The blocks of a prepared dataset that a model is evaluated on."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from muse_lightning.data.batches import IGNORED_LABEL, Batch, Collate
from muse_lightning.data.block_reader import read_block
from muse_lightning.data.card import (
    TOKENIZER_NAME,
    DatasetCard,
    check_index,
    count_blocks,
    largest_seq_len,
    read_card,
)
from muse_lightning.data.tokenizer import SpecialTokens, Tokenizer, load_tokenizer
from muse_lightning.errors import UserError


@dataclass(frozen=True)
class Blocks:
    """Batches of one row each, and what their labels stand for.

    Attributes:
        card: Of the dataset.
        batches: On the host.
        indices: Number of each block in stored order.
        other: A batch of one more row, to choose by what is then evaluated on the others: of a block that is not among
            them, where the split has one, else the first of them.
        other_index: Number of its block.
        token_bytes: int64 [ids]: bytes of text of each id.
    """

    card: DatasetCard
    batches: Sequence[Batch]
    indices: Sequence[int]
    other: Batch
    other_index: int
    token_bytes: Tensor

    def labels(self) -> list[int]:
        """Labels of each block."""
        return [int((batch["labels"] != IGNORED_LABEL).sum()) for batch in self.batches]

    def text_bytes(self) -> list[int]:
        """Bytes of text that the labels of each block stand for."""
        return [
            int((self.token_bytes[batch["labels"].clamp(min=0)] * (batch["labels"] != IGNORED_LABEL)).sum())
            for batch in self.batches
        ]


def read_blocks(dataset: Path, split: str, seq_len: int, count: int, document_mask: bool, vocab_size: int) -> Blocks:
    """Blocks spread evenly over a split.

    Args:
        dataset: a prepared dataset.
        split: its name.
        seq_len: tokens per block.
        count: how many at most.
        document_mask: whether documents are told apart.
        vocab_size: ids that the model has.
    Raises:
        UserError: no such dataset or split, no block of that length, or ids that the model lacks.
    """
    card = read_card(dataset)
    if len(card.token_bytes) > vocab_size:
        raise UserError(
            f"data: {dataset} was prepared with a tokenizer of {len(card.token_bytes)} ids, the model has "
            f"{vocab_size}; prepare the data with the model's tokenizer"
        )
    entry = card.split(split)
    check_index(dataset / split, entry, card.dtype)
    found = count_blocks(entry, seq_len)
    if not found:
        largest = largest_seq_len(entry, 1)
        raise UserError(
            f"seq_len: {seq_len} found; split {split!r} of {dataset} ({entry.tokens:,} tokens) has no block of that "
            f"length, the largest that works is {largest}"
        )
    count = min(count, found)
    indices = [(2 * i + 1) * found // (2 * count) for i in range(count)]
    collate = Collate(document_mask)
    other = next((index for index in range(found) if index not in indices), indices[0])
    batches = [collate([read_block(dataset / split, entry, card.dtype, seq_len, index)]) for index in [*indices, other]]
    return Blocks(card, batches[:-1], indices, batches[-1], other, torch.tensor(card.token_bytes))


def check_tokenizer(dataset: Path, model: Tokenizer | None, source: str) -> None:
    """Refuse data whose ids mean something else to the model.

    Ids are compared by their text: a tokenizer that was exported and read again is another file with the same ids.

    Args:
        dataset: a prepared dataset.
        model: the model's tokenizer; None where it has none, which is said on standard error.
        source: the model, for messages.
    Raises:
        UserError: an id stands for another text.
    """
    if model is None:
        print(f"compare: {source} has no tokenizer: whether the data is of its ids is not checked", file=sys.stderr)
        return
    card = read_card(dataset)
    is_built_in = not (dataset / TOKENIZER_NAME).is_file()
    name = "bytes" if is_built_in else str(dataset / TOKENIZER_NAME)
    texts = load_tokenizer(name, SpecialTokens(**card.tokenizer["special_tokens"])).token_texts
    for i, (of_data, of_model) in enumerate(zip(texts, model.token_texts, strict=False)):
        # What is special to one may be text to the other, which documents do not hold.
        if of_data and of_model and of_data != of_model:
            raise UserError(
                f"data: {dataset} was prepared with another tokenizer than {source} has: id {i} stands for {of_data!r} "
                f"there, for {of_model!r} here; prepare it with the model's"
            )
