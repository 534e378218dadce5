"""Prepared datasets as a recipe names them: one, or several with weights; in folders or at URLs."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from muse_lightning.data.block_reader import LocalChunks, SplitFiles
from muse_lightning.data.card import DatasetCard, check_index, count_blocks, largest_seq_len, read_card
from muse_lightning.data.filesystems import is_url
from muse_lightning.data.mixing import Part
from muse_lightning.data.prepare import damaged_chunks
from muse_lightning.data.remote import CachedChunks, ChunkCache, copy_description
from muse_lightning.data.tokenizer import Tokenizer
from muse_lightning.errors import UserError, shown_url
from muse_lightning.files import expand_home


@dataclass(frozen=True)
class MixtureEntry:
    """One dataset of `data.mixture`."""

    dataset: str
    """Folder or URL of a prepared dataset."""
    weight: float
    """Its share of the training tokens, over the sum of all weights. 0: nothing is read of it, its place is kept."""


@dataclass(frozen=True)
class PreparedDataset:
    """One dataset, opened.

    Attributes:
        name: As the recipe has it, without credentials.
        url: Of a remote one; None for a folder.
        key: Where the recipe has it, for messages.
        weight: See MixtureEntry.
        folder: Of its files; of a remote one, of the copies of those that describe it.
        card: Its card.
        cache: Where chunks of a remote dataset are copied to; None for a folder.
    """

    name: str
    url: str | None = field(repr=False)
    key: str
    weight: float
    folder: Path
    card: DatasetCard
    cache: ChunkCache | None

    @classmethod
    def open(cls, name: str, key: str, weight: float, cache: ChunkCache) -> "PreparedDataset":
        """Read its card.

        Raises:
            UserError: there is none.
        """
        if is_url(name):
            url = name.rstrip("/")
            folder = copy_description(url, cache.folder)
            return cls(shown_url(url), url, key, weight, folder, read_card(folder), cache)
        folder = expand_home(name)
        return cls(name, None, key, weight, folder, read_card(folder), None)

    def check(self, splits: Sequence[str]) -> None:
        """Check that the files of these splits are whole, as far as that takes no reading of chunks.

        Raises:
            UserError: a chunk is missing or of another size, or an index is not the one that the card describes.
        """
        damaged = damaged_chunks(self.folder, self.card) if self.cache is None else []
        if damaged:
            raise UserError(f"data chunk {damaged[0]}; prepare the dataset again")
        for split in splits:
            if split in self.card.splits:
                check_index(self.folder / split, self.card.splits[split], self.card.dtype)

    def split(self, name: str) -> SplitFiles:
        """A split by name.

        Raises:
            UserError: the dataset has no such split.
        """
        entry = self.card.split(name)
        if self.cache is None:
            return SplitFiles(entry, self.card.dtype, LocalChunks((self.folder / name).absolute()))
        return SplitFiles(entry, self.card.dtype, CachedChunks(f"{self.url}/{name}", self.cache))

    def part(self, seq_len: int) -> Part:
        """Its part in a plan of training."""
        return Part(self.name, self.card.fingerprint, self.split("train").counts(seq_len), self.weight)


def listed_datasets(dataset: str | None, mixture: Sequence[MixtureEntry] | None) -> list[tuple[str, str, float]]:
    """Name, key in the recipe and weight of each dataset.

    Raises:
        UserError: neither or both of `dataset` and `mixture` are given, or a weight is not accepted.
    """
    if (dataset is None) == (mixture is None):
        raise UserError(
            f"data.dataset: {'nothing' if dataset is None else 'also data.mixture'} found; give one dataset there, or "
            "several in data.mixture: [{dataset: PATH, weight: 0.8}, ...]"
        )
    if mixture is None:
        return [(str(dataset), "data.dataset", 1.0)]
    if not mixture:
        raise UserError("data.mixture: no dataset found, at least one expected")
    for index, entry in enumerate(mixture):
        if not 0 <= entry.weight < float("inf"):
            raise UserError(f"data.mixture[{index}].weight: {entry.weight} found, a number of at least 0 expected")
    if not any(entry.weight for entry in mixture):
        raise UserError("data.mixture: every weight is 0, at least one above 0 expected")
    return [(entry.dataset, f"data.mixture[{index}].dataset", entry.weight) for index, entry in enumerate(mixture)]


def check_different(datasets: Sequence[PreparedDataset]) -> None:
    """Refuse a mixture of the same content twice: its tokens would be seen twice in an epoch.

    Raises:
        UserError: two datasets have one fingerprint.
    """
    seen: dict[str, PreparedDataset] = {}
    for dataset in datasets:
        other = seen.setdefault(dataset.card.fingerprint, dataset)
        if other is not dataset:
            raise UserError(f"{dataset.key}: {dataset.name} holds the same as {other.name}; list it once")


def check_tokenizer(datasets: Sequence[PreparedDataset], tokenizer: Tokenizer, name: str) -> None:
    """Refuse datasets whose ids mean something else than the configured tokenizer's.

    Args:
        datasets: All of them.
        tokenizer: The configured one.
        name: As configured.
    Raises:
        UserError: datasets were prepared with different tokenizers, or with another than the configured one.
    """
    found = [dataset.card.tokenizer for dataset in datasets]
    if len({one["sha256"] for one in found}) > 1:
        each = ", ".join(
            f"{dataset.name} with {one['name']} ({one['sha256'][:12]})"
            for dataset, one in zip(datasets, found, strict=True)
        )
        raise UserError(
            f"data.mixture: prepared with different tokenizers: {each}; prepare all of them with one, as muse prepare "
            "--data.tokenizer=PATH"
        )
    if found[0]["sha256"] != tokenizer.sha256:
        raise UserError(
            f"{_difference(datasets[0], tokenizer, name)}; configure that one, or prepare the data again (data.sources)"
        )


def _difference(dataset: PreparedDataset, tokenizer: Tokenizer, name: str) -> str:
    """What tells the configured tokenizer from a dataset's, in words."""
    prepared = dataset.card.tokenizer
    if name != prepared["name"]:
        return f"data.tokenizer: {name} found, but {dataset.name} was prepared with {prepared['name']}"
    special = asdict(tokenizer.special_tokens)
    changed = [field for field in special if special[field] != prepared["special_tokens"][field]]
    if changed:
        here, there = (
            ", ".join(f"{field} {of[field]!r}" for field in changed) for of in (special, prepared["special_tokens"])
        )
        return f"data.special_tokens: {here} found, but {dataset.name} was prepared with {there}"
    here, there = tokenizer.sha256[:12], prepared["sha256"][:12]
    other = f"another file of that name ({there})"
    return f"data.tokenizer: {name} ({here}) found, but {dataset.name} was prepared with {other}"


def check_blocks(datasets: Sequence[PreparedDataset], split: str, seq_len: int, needed: int, per: str) -> None:
    """Check that a split of all datasets together has enough blocks, and `train` one of each dataset that is read.

    Args:
        datasets: Those that have the split.
        split: Its name.
        seq_len: Context.
        needed: Blocks that one step takes.
        per: What for, for the message.
    Raises:
        UserError: names the largest context that would work.
    """
    groups = [list(datasets)]
    if split == "train" and len(datasets) > 1:
        groups += [[dataset] for dataset in datasets if dataset.weight]
    for number, group in enumerate(groups):
        entries = [dataset.card.splits[split] for dataset in group]
        least = needed if number == 0 else 1
        found = sum(count_blocks(entry, seq_len) for entry in entries)
        if found >= least:
            continue
        together = replace(entries[0], chunks=[chunk for entry in entries for chunk in entry.chunks])
        largest = largest_seq_len(together, least)
        cure = f"the largest that works is {largest}" if largest else "no context is short enough: give more data"
        if split in ("val", "test"):
            cure += f", or prepare again with a larger data.{split}_fraction"
        name = f"split {split!r}" + (f" of {group[0].name}" if number else "")
        tokens = sum(entry.tokens for entry in entries)
        what = f"{least} are needed for {per}" if number == 0 else "1 is needed"
        raise UserError(
            f"data.seq_len: {seq_len} found; {name} ({tokens:,} tokens) has {found} blocks of that length, "
            f"{what}; {cure}"
        )
