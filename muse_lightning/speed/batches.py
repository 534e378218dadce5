"""Batches without data: random tokens, so that nothing but the training step is measured."""

from collections.abc import Sequence

import torch
from torch.utils.data import DataLoader, Dataset

from muse_lightning.data.batches import Batch, cumulative_lengths
from muse_lightning.errors import UserError


def random_batch(vocab_size: int, batch_size: int, seq_len: int, documents: Sequence[int] | None) -> Batch:
    """One batch in the project's format, always the same.

    Args:
        documents: lengths of packed documents, at least 1 each, repeated until a row is full; None: each row is one
            document, and attention is not told.
    """
    tokens = torch.randint(vocab_size, (batch_size, seq_len + 1), generator=torch.Generator().manual_seed(0))
    batch = Batch(input_ids=tokens[:, :-1].contiguous(), labels=tokens[:, 1:].contiguous())
    if documents:
        starts, position = [], 0
        while position < seq_len:
            starts.append(position)
            position += documents[(len(starts) - 1) % len(documents)]
        batch["cu_seqlens"] = cumulative_lengths([torch.tensor(starts)] * batch_size, seq_len)
    return batch


def check_documents(documents: Sequence[int] | None) -> None:
    """Refuse lengths that no document has.

    Raises:
        UserError: a length is below 1, or there is none.
    """
    if documents is not None and (not documents or min(documents) < 1):
        raise UserError(f"bench.documents: lengths of at least 1 expected, found {list(documents)}")


class _Repeated(Dataset[Batch]):
    def __init__(self, batch: Batch, count: int) -> None:
        self._batch, self._count = batch, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Batch:
        if index >= self._count:
            raise IndexError(index)
        return self._batch


def repeated(batch: Batch, count: int) -> DataLoader[Batch]:
    """A loader that gives the same batch `count` times, from memory that a GPU can copy from at once."""
    if torch.cuda.is_available():
        for name, tensor in batch.items():
            if isinstance(tensor, torch.Tensor):
                batch[name] = tensor.pin_memory()  # type: ignore[literal-required]
    return DataLoader(_Repeated(batch, count), batch_size=None)
