"""BlockReader: blocks of any length, with the documents in them, by their ids.

It reads litdata's chunk files without litdata, whose item loaders keep no document borders, and checks the content of
each whenever it is opened.
"""

import hashlib
import os
from abc import ABC, abstractmethod
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path

import numpy as np
import torch

from muse_lightning.data.card import ChunkEntry, SplitEntry
from muse_lightning.data.mixing import BlockId
from muse_lightning.errors import UserError


@dataclass(frozen=True)
class Block:
    """`seq_len + 1` consecutive tokens of a chunk.

    Attributes:
        tokens: [seq_len + 1], the stored type.
        starts: int64 [documents that begin in the block]. Positions in the block, increasing.
        id: Which block it is; None where it was not read by its id.
    """

    tokens: torch.Tensor
    starts: torch.Tensor
    id: BlockId | None = None


class Chunk:
    """One chunk file, open. Its layout is litdata's: uint32 number of documents, as many byte offsets and one more,
    then tokens.

    The file is mapped, not read: what the disk cache holds is shared by all processes of a machine, and a file that is
    removed while it is open stays readable.
    """

    def __init__(self, path: Path, entry: ChunkEntry, dtype: str) -> None:
        """
        Args:
            path: The file.
            entry: What the card says of it.
            dtype: The stored type of a token.
        Raises:
            UserError: it is missing, or its content is not what was written.
        """
        itemsize = np.dtype(dtype).itemsize
        header_bytes = 4 * (entry.documents + 2)
        try:
            # Opened once: the file may be removed, to make room for another, at any time.
            with path.open("rb") as file:
                check_content(file, path, entry.sha256)
                self.starts = document_starts(file, itemsize)
                size = os.fstat(file.fileno()).st_size
                if len(self.starts) != entry.documents or size != header_bytes + entry.tokens * itemsize:
                    raise UserError(
                        f"data chunk {path} does not hold what dataset.json says; prepare the dataset again"
                    )
                self.tokens = np.memmap(file, dtype=dtype, mode="r", offset=header_bytes, shape=(entry.tokens,))
        except OSError as error:
            raise UserError(f"data chunk {path}: {error.strerror}; prepare the dataset again") from error

    def block(self, index: int, block_size: int) -> Block:
        """Block number `index` of `block_size` tokens."""
        first = index * block_size
        tokens = torch.from_numpy(np.array(self.tokens[first : first + block_size]))
        low, high = np.searchsorted(self.starts, (first, first + block_size))
        return Block(tokens, torch.from_numpy(self.starts[low:high] - first))


class Chunks(ABC):
    """The chunk files of one split, wherever they lie. Picklable."""

    @abstractmethod
    def open(self, entry: ChunkEntry, dtype: str) -> Chunk:
        """Open a chunk.

        Raises:
            UserError: it is missing or damaged.
        """


class LocalChunks(Chunks):
    """Chunk files in a folder, read in place."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def open(self, entry: ChunkEntry, dtype: str) -> Chunk:
        return Chunk(self.folder / entry.filename, entry, dtype)


@dataclass(frozen=True)
class SplitFiles:
    """One split of one dataset.

    Attributes:
        entry: Its entry in the card.
        dtype: The stored type of a token.
        chunks: Its files.
    """

    entry: SplitEntry
    dtype: str
    chunks: Chunks

    def counts(self, seq_len: int) -> tuple[int, ...]:
        """Blocks of each chunk. A chunk's last tokens that fill no block are left out."""
        return tuple(chunk.tokens // (seq_len + 1) for chunk in self.entry.chunks)


class BlockReader(torch.utils.data.Dataset[Block]):
    """Blocks by their id. Of each dataset one chunk is open at a time."""

    def __init__(self, splits: list[SplitFiles], seq_len: int) -> None:
        """
        Args:
            splits: The split of each dataset, in the order of the recipe.
            seq_len: Context; blocks have one token more.
        """
        self.splits = splits
        self.seq_len = seq_len
        self._open: dict[int, tuple[int, Chunk]] = {}

    def __getitem__(self, which: BlockId) -> Block:
        """Read one block.

        Raises:
            UserError: its chunk is missing or damaged.
        """
        found = self._open.get(which.dataset)
        if found is None or found[0] != which.chunk:
            split = self.splits[which.dataset]
            entry = split.entry.chunks[which.chunk]
            found = which.chunk, split.chunks.open(entry, split.dtype)
            self._open[which.dataset] = found
        block = found[1].block(which.block, self.seq_len + 1)
        return Block(block.tokens, block.starts, which)

    def __getstate__(self) -> dict[str, object]:
        # A worker process opens, and so checks, what it reads itself.
        return {**self.__dict__, "_open": {}}


def check_content(file: BufferedReader, path: Path, sha256: str) -> None:
    """Compare an open chunk file with the manifest.

    Raises:
        UserError: its content is not what was written.
    """
    found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise UserError(
            f"data chunk {path} is damaged: its SHA-256 is {found[:12]}... instead of {sha256[:12]}...; "
            "delete the dataset's folder and prepare it again"
        )


def document_starts(file: Path | BufferedReader, itemsize: int) -> np.ndarray:
    """int64 [documents in the chunk]: the token at which each begins, from the chunk's header of byte offsets."""
    if isinstance(file, Path):
        with file.open("rb") as opened:
            return document_starts(opened, itemsize)
    file.seek(0)
    count = int(np.fromfile(file, dtype=np.uint32, count=1)[0])
    offsets = np.fromfile(file, dtype=np.uint32, count=count + 1).astype(np.int64)
    return (offsets[:-1] - offsets[0]) // itemsize


def read_block(folder: Path, entry: SplitEntry, dtype: str, seq_len: int, index: int) -> Block:
    """One block of a split by its number alone; of the chunks, only its own is read.

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
    for chunk in entry.chunks:
        count = chunk.tokens // (seq_len + 1)
        if index < count:
            return Chunk(folder / chunk.filename, chunk, dtype).block(index, seq_len + 1)
        index -= count
    raise IndexError("the split has no such block")
