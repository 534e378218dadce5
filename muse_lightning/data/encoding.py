"""Second stage: the chosen documents become ids, a few megabytes of text per job."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from muse_lightning.data.choosing import Documents
from muse_lightning.data.inventory import Columns
from muse_lightning.data.jobs import Job, Meter
from muse_lightning.data.packs import Pack
from muse_lightning.data.selection import FileOrder, order_files
from muse_lightning.data.tokenizer import Tokenizer
from muse_lightning.files import sha256_bytes

# Text of one job: seconds of work, which is what a kill can lose.
_JOB_BYTES = 8 << 20
# Text given to the tokenizer at once: enough to keep its threads busy, little enough for their results.
_BATCH_BYTES = 2 << 20
# Part of every job's key: raise it when the same files would give other ids.
_ENCODING_VERSION = 1

ENCODED = np.dtype([("tokens", "<u8"), ("text_bytes", "<u8")])


@dataclass(frozen=True)
class EncodeJob(Job):
    """Documents to encode one after the other."""

    names: list[str]
    borders: np.ndarray
    """int64 [documents + 1]. The files of a document are those from its border to the next."""
    files: Columns
    contents: dict[int, Path]
    """The packs' files, by the number of the pack."""
    file_order: FileOrder
    readme_first: bool
    seed: int
    key: str
    size: int

    def run(self, folder: Path, context: Tokenizer, meter: Meter) -> dict[str, Any]:
        encoded = np.zeros(len(self.names), dtype=ENCODED)
        reader = _Reader(self.contents, self.files)
        try:
            with open(folder / "ids.bin", "wb", buffering=1 << 20) as file:
                for row, name in enumerate(self.names):
                    for ids in self._encode(row, name, context, reader, meter):
                        file.write(ids.tobytes())
                        encoded[row]["tokens"] += len(ids)
                        encoded[row]["text_bytes"] += int(context.token_bytes[ids].sum())
        finally:
            reader.close()
        encoded.tofile(folder / "documents.bin")
        return {"files": len(self.files["size"])}

    def _encode(
        self, row: int, name: str, tokenizer: Tokenizer, reader: "_Reader", meter: Meter
    ) -> Iterator[np.ndarray]:
        """The ids of one document, in pieces.

        The text is Qwen2.5-Coder's: `<|repo_name|>name`, newline; per file `<|file_sep|>path`, newline, content, and a
        newline unless the content ends in one; `<|endoftext|>`.
        """
        special = {field: np.array([index], dtype=tokenizer.dtype) for field, index in tokenizer.special_ids.items()}
        yield special["repo_name"]
        yield from tokenizer.encode([os.fsencode(name) + b"\n"])
        low, high = int(self.borders[row]), int(self.borders[row + 1])
        paths = [reader.path(index) for index in range(low, high)]
        waiting: list[bytes] = []
        size = 0
        order = order_files(name, paths, self.file_order, self.readme_first, self.seed)
        for number, index in enumerate(order):
            content = reader.content(low + index)
            waiting.append(paths[index] + b"\n" + content + (b"" if content.endswith(b"\n") else b"\n"))
            size += len(content)
            if size >= _BATCH_BYTES or number == len(order) - 1:
                tokens = 0
                for ids in tokenizer.encode(waiting):
                    yield special["file_sep"]
                    yield ids
                    tokens += len(ids)
                meter(size, len(waiting), tokens)
                waiting, size = [], 0
        yield special["end"]


class _Reader:
    """Reads single files out of packs."""

    def __init__(self, contents: dict[int, Path], files: Columns) -> None:
        self._descriptors = {pack: os.open(path, os.O_RDONLY) for pack, path in contents.items()}
        self._pack = files["pack"].tolist()
        self._offset = files["offset"].tolist()
        self._path_bytes = files["path_bytes"].tolist()
        self._size = files["size"].tolist()

    def path(self, index: int) -> bytes:
        return os.pread(self._descriptors[self._pack[index]], self._path_bytes[index], self._offset[index])

    def content(self, index: int) -> bytes:
        start = self._offset[index] + self._path_bytes[index]
        return os.pread(self._descriptors[self._pack[index]], self._size[index], start)

    def close(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)


def encode_jobs(
    documents: Documents,
    packs: Sequence[Pack],
    tokenizer: Tokenizer,
    *,
    file_order: FileOrder,
    readme_first: bool,
    seed: int,
) -> Iterator[EncodeJob]:
    """Group the documents, in their order, into jobs of about 8 MiB."""
    borders = documents.borders()
    ends = np.cumsum(documents.sizes)
    low = 0
    while low < len(documents):
        before = int(ends[low - 1]) if low else 0
        high = max(low + 1, int(np.searchsorted(ends, before + _JOB_BYTES)))
        rows = slice(int(borders[low]), int(borders[high]))
        files = {column: documents.files[column][rows] for column in ("pack", "offset", "path_bytes", "size")}
        used = {number: packs[number] for number in np.unique(files["pack"]).tolist()}
        own = borders[low : high + 1] - borders[low]
        names = [documents.names[row] for row in documents.name[low:high]]
        # A pack's key stands for its content, whatever its number is.
        keys = [(number, pack.folder.name) for number, pack in used.items()]
        told = repr([_ENCODING_VERSION, tokenizer.sha256, file_order, readme_first, seed, names, own.tolist(), keys])
        key = sha256_bytes(told.encode("utf-8", "surrogateescape") + b"".join(c.tobytes() for c in files.values()))
        yield EncodeJob(
            names,
            own,
            files,
            {number: pack.content for number, pack in used.items()},
            file_order,
            readme_first,
            seed,
            key[:32],
            int(documents.sizes[low:high].sum()),
        )
        low = high


@dataclass(frozen=True)
class EncodedPart:
    """The ids of some documents, on the disk."""

    folder: Path

    @property
    def ids(self) -> Path:
        """All ids, one document after the other."""
        return self.folder / "ids.bin"

    def documents(self) -> np.ndarray:
        """[documents] of ENCODED."""
        return np.fromfile(self.folder / "documents.bin", dtype=ENCODED)
