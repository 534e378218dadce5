"""Blocks of any length, with the documents in them, read from litdata chunks whose content is checked at first read."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import litdata
import numpy as np
import torch

from muse_lightning.data.card import SplitEntry
from muse_lightning.errors import UserError
from muse_lightning.files import sha256_file


@dataclass(frozen=True)
class Block:
    """`seq_len + 1` consecutive tokens of a chunk.

    Attributes:
        tokens: [seq_len + 1], the stored type.
        starts: int64 [documents that begin in the block]. Positions in the block, increasing.
    """

    tokens: torch.Tensor
    starts: torch.Tensor


class TokensLoader(litdata.TokensLoader):
    """litdata's loader of token blocks, which also says where documents begin and trusts no chunk unchecked.

    It has litdata's own class name because an index names the class that reads it: what we prepare stays readable by
    plain litdata.
    """

    def __init__(self, block_size: int, entry: SplitEntry) -> None:
        """
        Args:
            block_size: Tokens per block, one more than the context.
            entry: The split's chunks, with the SHA-256 each must have.
        """
        super().__init__(block_size=block_size)
        self._sha256 = {chunk.filename: chunk.sha256 for chunk in entry.chunks}
        self._document_starts: dict[int, np.ndarray] = {}

    def load_item_from_chunk(
        self, index: int, chunk_index: int, chunk_filepath: str, begin: int, filesize_bytes: int
    ) -> Block:
        starts = self._document_starts.get(chunk_index)
        if starts is None:
            check_chunk(chunk_filepath, self._sha256[Path(chunk_filepath).name])
            starts = self._document_starts[chunk_index] = document_starts(chunk_filepath, self._dtype.itemsize)
        tokens = super().load_item_from_chunk(index, chunk_index, chunk_filepath, begin, filesize_bytes)
        first = (index - begin) * self._block_size
        low, high = np.searchsorted(starts, (first, first + self._block_size))
        return Block(torch.as_tensor(tokens), torch.from_numpy(starts[low:high] - first))

    def __getstate__(self) -> dict[str, Any]:
        # A worker process checks what it reads itself.
        return {**super().__getstate__(), "_document_starts": {}}


def check_chunk(path: Path | str, sha256: str) -> None:
    """Compare a chunk file with the manifest.

    Raises:
        UserError: it is missing, or its content is not what was written.
    """
    try:
        found = sha256_file(path)
    except OSError as error:
        raise UserError(f"data chunk {path}: {error.strerror}; prepare the dataset again") from error
    if found != sha256:
        raise UserError(
            f"data chunk {path} is damaged: its SHA-256 is {found[:12]}... instead of {sha256[:12]}...; "
            "delete the dataset's folder and prepare it again"
        )


def document_starts(path: Path | str, itemsize: int) -> np.ndarray:
    """int64 [documents in the chunk]: the token at which each begins, from the chunk's header of byte offsets."""
    count = int(np.fromfile(path, dtype=np.uint32, count=1)[0])
    offsets = np.fromfile(path, dtype=np.uint32, count=count + 1, offset=4).astype(np.int64)
    return (offsets[:-1] - offsets[0]) // itemsize


def read_block(folder: Path, entry: SplitEntry, dtype: str, seq_len: int, index: int) -> Block:
    """One block of a split, without litdata; of the chunks, only its own is read.

    Args:
        folder: The split's folder.
        entry: Its entry in the card.
        dtype: The stored type of a token.
        seq_len: Context; the block has one token more.
        index: Number of the block in stored order, from 0.
    Raises:
        UserError: the chunk is damaged.
        IndexError: the split has no such block.
    """
    block_size = seq_len + 1
    for chunk in entry.chunks:
        count = chunk.tokens // block_size
        if index < count:
            break
        index -= count
    else:
        raise IndexError("the split has no such block")
    path = folder / chunk.filename
    check_chunk(path, chunk.sha256)
    first = index * block_size
    header_bytes = 4 * (chunk.documents + 2)
    offset = header_bytes + first * np.dtype(dtype).itemsize
    tokens = np.fromfile(path, dtype=dtype, count=block_size, offset=offset)
    starts = document_starts(path, tokens.itemsize) - first
    return Block(torch.from_numpy(tokens), torch.from_numpy(starts[(starts >= 0) & (starts < block_size)]))
