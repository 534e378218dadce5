"""TokenDataModule: a recipe's `data:` section. Prepares the dataset, then turns chunks into batches."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import torch

from muse_lightning.data.batches import Collate
from muse_lightning.data.block_reader import Block, BlockReader
from muse_lightning.data.card import DatasetCard
from muse_lightning.data.documents import DEFAULT_ARCHIVE_LIMITS, ArchiveLimits, DocumentSource
from muse_lightning.data.filesystems import is_url
from muse_lightning.data.filters import DEFAULT_FILTERS, Filters
from muse_lightning.data.ledger import LedgerDataset, LedgerHeader
from muse_lightning.data.mixing import Plan
from muse_lightning.data.order import Order
from muse_lightning.data.prepare import Preparation, prepare_dataset
from muse_lightning.data.prepared import (
    MixtureEntry,
    PreparedDataset,
    check_blocks,
    check_different,
    check_tokenizer,
    listed_datasets,
)
from muse_lightning.data.remote import ChunkCache, copy_tokenizer
from muse_lightning.data.selection import FileOrder, Limits
from muse_lightning.data.streaming import EvaluationLoader, Share, TrainLoader
from muse_lightning.data.tokenizer import DEFAULT_SPECIAL_TOKENS, SpecialTokens, load_tokenizer
from muse_lightning.errors import UserError, shown_url
from muse_lightning.files import expand_home

DEFAULT_CACHE_DIR = Path("~/.cache/muse-lightning/chunks")
_STAGE_SPLITS = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",)}


class TokenDataModule(L.LightningDataModule):
    """Blocks of tokens with their document boundaries, from a dataset that is prepared once and used again.

    Attributes:
        vocab_size: Number of ids of the tokenizer; the model's must be at least that.
        token_bytes: int64 [vocab_size]. Bytes of text of each id, 0 for special tokens: what bits per byte are divided
            by.
    """

    def __init__(
        self,
        dataset: str | None = None,
        sources: list[DocumentSource] | None = None,
        tokenizer: str = "bytes",
        *,
        seq_len: int,
        batch_size: int,
        document_mask: bool = True,
        num_workers: int = 0,
        seed: int = 0,
        val_fraction: float = 0.01,
        test_fraction: float = 0.0,
        file_order: FileOrder = "shuffle",
        readme_first: bool = False,
        prepare_seed: int = 0,
        prepare_workers: int = 1,
        max_documents: int | None = None,
        max_bytes: int | None = None,
        max_document_bytes: int = 33_554_432,
        min_document_tokens: int = 0,
        long_document_tokens: int = 65_536,
        long_document_share: float | None = None,
        source_weights: list[float] | None = None,
        held_out: list[str] | None = None,
        deduplicate: bool = True,
        skip_damaged: bool = True,
        chunk_bytes: int = 67_108_864,
        filters: Filters = DEFAULT_FILTERS,
        archive_limits: ArchiveLimits = DEFAULT_ARCHIVE_LIMITS,
        special_tokens: SpecialTokens = DEFAULT_SPECIAL_TOKENS,
        predict_split: str = "val",
        mixture: list[MixtureEntry] | None = None,
        ranks_per_block: int = 1,
        cache_dir: Path = DEFAULT_CACHE_DIR,
        cache_bytes: int = 107_374_182_400,
    ) -> None:
        """
        Args:
            dataset: Folder of the prepared dataset. It is made there if missing, and again if anything it depends on
                changed. Or the URL of one that is prepared: s3://, gs://, hf:// and others of fsspec.
            sources: Where documents come from. null: the dataset must be there already, and is taken as it is.
            tokenizer: bytes (256 ids, nothing to train), or the path or URL of a tokenizer.json or of a prepared
                dataset that has one.
            seq_len: Context in tokens. Any length, without preparing the data again.
            batch_size: Sequences per device and step. Memory grows with batch_size * seq_len.
            document_mask: Whether attention stops at document boundaries. Documents are repositories; it never stops
                between the files of one.
            num_workers: Processes that read batches; 0 reads in the training process. The batches are the same for any
                number.
            seed: Of the order of batches. Recipes link it from seed_everything.
            val_fraction: Share of the bytes kept whose repositories are held out for validation; 0 for no validation.
            test_fraction: Share held out for `muse test`; 0 for none. What held_out names is `test` instead, if there
                is any.
            file_order: Order of files in a document: shuffle (seeded) or path.
            readme_first: Whether the README in a document's topmost folder goes before its other files.
            prepare_seed: Of the split, the order of documents and of files. Apart from seed, so that runs of several
                seeds share a dataset and its held-out repositories.
            prepare_workers: Processes that prepare; the dataset is the same for any number.
            max_documents: Most documents to use, drawn by prepare_seed; null for all.
            max_bytes: Most bytes of source text to use; documents are drawn by prepare_seed, each that still fits.
                null for all.
            max_document_bytes: A larger repository is cut by folder into several documents. In bytes, which are known
                before text becomes tokens; a token stands for at least one byte, so this bounds the tokens too.
            min_document_tokens: Shorter documents are dropped.
            long_document_tokens: From how many tokens on a document is long.
            long_document_share: Share of train's tokens that must lie in long documents; short ones are dropped, by
                prepare_seed, until it is reached. null: as it comes.
            source_weights: Share of each source in the bytes, in any unit and in the order of sources: as many
                documents are used as keep them without repeating any. null: all of each.
            held_out: Names of repositories, or patterns such as numpy* and org/*, that are never in train; they are
                the split test.
            deduplicate: Whether of files with equal content, in whatever repositories, one is used.
            skip_damaged: Whether a damaged archive or repository is left out, named and counted; false: an error.
            chunk_bytes: Bytes of source text per chunk file, about. A chunk is read by one worker after the other and
                held in memory when written; of each, the last tokens that fill no block go unused.
            filters: Which files are left out.
            archive_limits: What an archive may unpack to.
            special_tokens: Names of the special tokens, looked up in the tokenizer or added to it.
            predict_split: The split that `muse predict` reads.
            mixture: Instead of dataset: several prepared datasets, folders or URLs, with weights. Of the tokens trained
                on, each has the share that its weight has of all weights; a dataset that is used up starts again.
            ranks_per_block: As many ranks that follow each other read the same blocks, for ranks that share a sequence.
            cache_dir: Folder where chunks of remote datasets are kept, shared by all runs.
            cache_bytes: Most bytes there, of one machine. Room for a few chunks for each dataset and rank is enough;
                room for all of them makes the next epoch local.
        """
        super().__init__()
        for name, value, least in (
            ("seq_len", seq_len, 1),
            ("batch_size", batch_size, 1),
            ("num_workers", num_workers, 0),
            ("prepare_workers", prepare_workers, 1),
            ("chunk_bytes", chunk_bytes, 1),
            ("ranks_per_block", ranks_per_block, 1),
            ("cache_bytes", cache_bytes, 1),
        ):
            if value < least:
                raise UserError(f"data.{name}: {value} found, at least {least} expected")
        if min(val_fraction, test_fraction) < 0 or val_fraction + test_fraction >= 1:
            raise UserError(
                f"data.val_fraction + data.test_fraction: {val_fraction} + {test_fraction} found, "
                "each at least 0 and together less than 1 expected"
            )
        self._listed = listed_datasets(dataset, mixture)
        if sources is not None and (dataset is None or is_url(str(dataset))):
            raise UserError(
                "data.sources: given, but only data.dataset as a folder can be prepared; prepare each dataset by a "
                "recipe of its own, and set data.sources to null here"
            )
        self.dataset = expand_home(self._listed[0][0])
        self._cache = ChunkCache(expand_home(cache_dir), cache_bytes)
        self.ranks_per_block = ranks_per_block
        self.sources = sources
        self.tokenizer_name = shown_url(tokenizer)
        self.seq_len = seq_len
        self.batch_size = batch_size
        self.document_mask = document_mask
        self.num_workers = num_workers
        self.seed = seed
        self.predict_split = predict_split
        self.preparation = Preparation(
            filters=filters,
            limits=Limits(
                max_documents,
                max_bytes,
                max_document_bytes,
                min_document_tokens,
                long_document_tokens,
                long_document_share,
            ),
            fractions={"val": val_fraction, "test": test_fraction},
            file_order=file_order,
            seed=prepare_seed,
            chunk_bytes=chunk_bytes,
            num_workers=prepare_workers,
            readme_first=readme_first,
            deduplicate=deduplicate,
            skip_damaged=skip_damaged,
            held_out=tuple(held_out or ()),
            source_weights=None if source_weights is None else tuple(source_weights),
            archive_limits=archive_limits,
        )
        self._mistake = ""
        file = str(copy_tokenizer(tokenizer, self._cache.folder)) if is_url(tokenizer) else tokenizer
        self.tokenizer = load_tokenizer(file, special_tokens)
        self.vocab_size = self.tokenizer.vocab_size
        self.token_bytes = torch.from_numpy(self.tokenizer.token_bytes)
        self._opened: list[PreparedDataset] | None = None
        self._train: TrainLoader | None = None
        self._train_state: dict[str, Any] | None = None

    @property
    def card(self) -> DatasetCard:
        """The card of the dataset, of several that of the first; read when first asked for.

        Raises:
            UserError: see `datasets`.
        """
        return self.datasets[0].card

    @property
    def datasets(self) -> list[PreparedDataset]:
        """The dataset, or those of the mixture; opened when first asked for.

        Raises:
            UserError: one is not there, or of another tokenizer, or two are the same.
        """
        if self._opened is None:
            opened = [PreparedDataset.open(*listed, self._cache) for listed in self._listed]
            check_tokenizer(opened, self.tokenizer, self.tokenizer_name)
            check_different(opened)
            self._opened = opened
        return self._opened

    def prepare_data(self) -> None:
        """Make the dataset if it is missing or stale. Lightning calls this on one rank while the others wait.

        Raises:
            UserError: it cannot be made. Under a trainer that is left to `setup`, which all ranks reach.
        """
        if self.sources is None:
            return
        self._opened = None
        try:
            prepare_dataset(self.dataset, self.sources, self.tokenizer, self.tokenizer_name, self.preparation)
        except UserError as error:
            if self.trainer is None:
                raise
            self._mistake = str(error)

    def setup(self, stage: str) -> None:
        """Check that every split the stage needs is whole and has a block for every rank.

        Raises:
            UserError: it is not, and the message names the largest context that would work; or it could not be made.
        """
        mistake = self._mistake if self.trainer is None else self.trainer.strategy.broadcast(self._mistake)
        if mistake:
            raise UserError(mistake)
        self.check_files(stage)
        self.check_blocks(stage, self._share.readers)

    def check_files(self, stage: str) -> None:
        """Check that the datasets are there, of the configured tokenizer, and that the splits of a stage are whole.

        Raises:
            UserError: they are not.
        """
        for dataset in self.datasets:
            dataset.check(_STAGE_SPLITS.get(stage, (self.predict_split,)))

    def check_blocks(self, stage: str, readers: int) -> None:
        """Check that every split of a stage is there and has enough blocks of the context.

        Args:
            stage: fit, validate, test or predict.
            readers: Ranks, or groups of ranks that read the same.
        Raises:
            UserError: one is not there; or has too few, and the message names the largest context that would work.
        """
        for split in _STAGE_SPLITS.get(stage, (self.predict_split,)):
            if stage != "fit" or split != "val" or self._with(split):
                self._check_split(split, readers)

    def _with(self, split: str) -> list[PreparedDataset]:
        """The datasets that have a split and are read in it."""
        return [
            dataset
            for dataset in self.datasets
            if split in dataset.card.splits and (dataset.weight > 0 or split != "train")
        ]

    def _check_split(self, split: str, readers: int) -> None:
        datasets = self._with(split)
        missing = [dataset for dataset in self.datasets if split not in dataset.card.splits]
        if not datasets or (split == "train" and missing):
            name, splits = missing[0].name, ", ".join(missing[0].card.splits)
            raise UserError(
                f"split {split!r} is empty: {name} has {splits}; "
                f"set data.{split}_fraction above 0 and give data.sources"
                if split in ("val", "test")
                else f"data.predict_split: {split!r} found, {name} has {splits}"
            )
        # A training batch is always whole, the last one of an evaluation need not be.
        needed = readers * self.batch_size if split == "train" else readers
        per = f"{readers} rank(s)" if self.ranks_per_block == 1 else f"{readers} groups of {self.ranks_per_block} ranks"
        check_blocks(
            datasets,
            split,
            self.seq_len,
            needed,
            per + (f" of batch_size {self.batch_size}" if split == "train" else ""),
        )

    @property
    def _world_size(self) -> int:
        return self.trainer.world_size if self.trainer is not None else 1

    @property
    def _rank(self) -> int:
        return self.trainer.global_rank if self.trainer is not None else 0

    @property
    def _share(self) -> Share:
        return Share.of(self._rank, self._world_size, self.ranks_per_block)

    def train_dataloader(self) -> TrainLoader:
        """Whole batches, in another order in each epoch; after a checkpoint was loaded, those that follow it.

        Raises:
            UserError: the checkpoint is of other data.
        """
        self._train = self._train_loader()
        if self._train_state is not None:
            self._train.load_state_dict(self._train_state)
        return self._train

    def _train_loader(self) -> TrainLoader:
        share = self._share
        parts = [dataset.part(self.seq_len) for dataset in self.datasets]
        return TrainLoader(
            BlockReader([dataset.split("train") for dataset in self.datasets], self.seq_len),
            Collate(self.document_mask, with_record=True),
            self.num_workers,
            plan=Plan(parts, self.seed, share.readers * self.batch_size),
            batch_size=self.batch_size,
            share=share,
        )

    def _evaluation_loader(self, split: str, order: Order) -> EvaluationLoader:
        return EvaluationLoader(
            BlockReader([dataset.split(split) for dataset in self._with(split)], self.seq_len),
            Collate(self.document_mask),
            self.num_workers,
            batch_size=self.batch_size,
            share=self._share,
            order=order,
        )

    def val_dataloader(self) -> EvaluationLoader | list[EvaluationLoader]:
        """Every block, in one random order that is the same for every validation, run and seed: the first batches, all
        that `limit_val_batches` leaves, are of many documents. An empty list when no validation was asked for."""
        return self._evaluation_loader("val", "shuffled") if self._with("val") else []

    def test_dataloader(self) -> EvaluationLoader:
        """Every block, in stored order."""
        return self._evaluation_loader("test", "stored")

    def predict_dataloader(self) -> EvaluationLoader:
        """Every block of the split `predict_split`, in stored order."""
        return self._evaluation_loader(self.predict_split, "stored")

    def training_blocks(self) -> Iterator[Block]:
        """The blocks that all ranks together read in a first epoch, in that order."""
        loader = self._train_loader()
        for batch, _ in loader.plan.epoch(loader.plan.start()):
            yield from (loader.reader[which] for which in batch)

    def validation_blocks(self) -> Iterator[Block]:
        """The blocks that all ranks together read in a validation, in that order."""
        return self._evaluation_loader("val", "shuffled").blocks()

    def identity(self) -> list[dict[str, str]]:
        """Name and fingerprint of each dataset: equal fingerprints, equal data, wherever it lies.

        Raises:
            UserError: see `datasets`.
        """
        return [{"name": dataset.name, "fingerprint": dataset.card.fingerprint} for dataset in self.datasets]

    def state_dict(self) -> dict[str, Any]:
        """Where training stands in the data.

        The loader has it too, but Lightning restores no loader where an epoch has ended and epochs are counted.
        """
        return {"train": self._train.state_dict()} if self._train is not None else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Let the next `train_dataloader` go on from there."""
        self._train_state = state_dict.get("train")

    @property
    def batches_read(self) -> int:
        """Batches that this rank has trained on since the first step of the run."""
        return self._train.batches_read if self._train is not None else 0

    def ledger_header(self, batch: int) -> LedgerHeader:
        """What the ledger says of the batches from number `batch` on."""
        return LedgerHeader(
            datasets=[
                LedgerDataset(part.name, part.fingerprint, part.weight, list(part.counts))
                for part in (dataset.part(self.seq_len) for dataset in self.datasets)
            ],
            rank=self._rank,
            world_size=self._world_size,
            ranks_per_block=self.ranks_per_block,
            batch_size=self.batch_size,
            seq_len=self.seq_len,
            batch=batch,
        )
