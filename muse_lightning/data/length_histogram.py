"""How long the documents of a dataset are, as a picture: `muse data inspect DIR --histogram lengths.png`."""

import io
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from muse_lightning.data.block_reader import document_starts
from muse_lightning.data.card import LONG_DOCUMENT_TOKENS, DatasetCard
from muse_lightning.errors import UserError
from muse_lightning.files import atomic_write


def document_lengths(dataset: Path, card: DatasetCard, split: str) -> np.ndarray:
    """int64 [documents]. Tokens of every document of a split, from the headers of the chunks alone.

    Raises:
        UserError: there is no such split, or a chunk is missing or no chunk.
    """
    lengths = []
    for chunk in card.split(split).chunks:
        path = dataset / split / chunk.filename
        try:
            starts = document_starts(path, np.dtype(card.dtype).itemsize)
        except (OSError, IndexError, ValueError) as error:
            raise UserError(f"data chunk {path} is missing or damaged; prepare the dataset again") from error
        if len(starts) != chunk.documents:
            raise UserError(f"data chunk {path} is damaged: its header is not the written one; prepare the data again")
        lengths.append(np.diff([*starts.tolist(), chunk.tokens]))
    return np.concatenate(lengths)


def draw_lengths(dataset: Path, card: DatasetCard, path: Path) -> None:
    """Draw a histogram of the documents' lengths: for each split, the share of its tokens by the length of the document
    they are in.

    Args:
        dataset: Folder of the dataset.
        card: Its card.
        path: The PNG to write.
    Raises:
        UserError: the file cannot be written, or a chunk is damaged.
    """
    lengths = {split: document_lengths(dataset, card, split) for split in card.splits}
    low = min(int(of_split.min()) for of_split in lengths.values())
    high = max(int(of_split.max()) for of_split in lengths.values())
    # Four bins per doubling, as wide as the logarithmic axis shows them.
    edges = 2 ** (np.arange(4 * np.floor(np.log2(low)), 4 * np.log2(high + 1) + 2) / 4)
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for split, of_split in lengths.items():
        label = f"{split}: {len(of_split):,} documents, {of_split.sum():,} tokens"
        axes.hist(of_split, edges.tolist(), weights=of_split / of_split.sum(), histtype="step", label=label)
    for limit in LONG_DOCUMENT_TOKENS:
        axes.axvline(limit, color="0.7", linestyle=":", zorder=0)
    axes.set(xscale="log", xlabel="tokens of the document", ylabel="share of the tokens", title=dataset.name)
    axes.legend()
    content = io.BytesIO()
    # No date and no version: the same dataset gives the same file.
    figure.savefig(content, format="png", dpi=120, metadata={"Software": None})
    try:
        atomic_write(path, content.getvalue())
    except OSError as error:
        raise UserError(f"histogram: cannot write {path}: {error.strerror}") from error
