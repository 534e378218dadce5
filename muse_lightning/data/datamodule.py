"""TokenDataModule: a recipe's `data:` section. Prepares the dataset, then turns chunks into batches."""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import lightning as L
import torch
from litdata.utilities.env import _DistributedEnv

from muse_lightning.data.batches import Collate
from muse_lightning.data.card import DatasetCard, check_index, count_blocks, largest_seq_len, read_card
from muse_lightning.data.documents import DEFAULT_ARCHIVE_LIMITS, ArchiveLimits, DocumentSource
from muse_lightning.data.filters import DEFAULT_FILTERS, Filters
from muse_lightning.data.item_loader import Block
from muse_lightning.data.prepare import Preparation, damaged_chunks, prepare_dataset
from muse_lightning.data.selection import FileOrder, Limits
from muse_lightning.data.streaming import BlockDataset, BlockLoader, Order
from muse_lightning.data.tokenizer import DEFAULT_SPECIAL_TOKENS, SpecialTokens, load_tokenizer
from muse_lightning.errors import UserError

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
        dataset: Path,
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
    ) -> None:
        """
        Args:
            dataset: Folder of the prepared dataset. It is made there if missing, and again if anything it depends on
                changed.
            sources: Where documents come from. null: the dataset must be there already, and is taken as it is.
            tokenizer: bytes (256 ids, nothing to train), or the path of a tokenizer.json.
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
        """
        super().__init__()
        for name, value, least in (
            ("seq_len", seq_len, 1),
            ("batch_size", batch_size, 1),
            ("num_workers", num_workers, 0),
            ("prepare_workers", prepare_workers, 1),
            ("chunk_bytes", chunk_bytes, 1),
        ):
            if value < least:
                raise UserError(f"data.{name}: {value} found, at least {least} expected")
        if min(val_fraction, test_fraction) < 0 or val_fraction + test_fraction >= 1:
            raise UserError(
                f"data.val_fraction + data.test_fraction: {val_fraction} + {test_fraction} found, "
                "each at least 0 and together less than 1 expected"
            )
        self.dataset = dataset.expanduser()
        self.sources = sources
        self.tokenizer_name = tokenizer
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
        self.tokenizer = load_tokenizer(tokenizer, special_tokens)
        self.vocab_size = self.tokenizer.vocab_size
        self.token_bytes = torch.from_numpy(self.tokenizer.token_bytes)
        self._card: DatasetCard | None = None

    @property
    def card(self) -> DatasetCard:
        """The dataset's card; read when first asked for.

        Raises:
            UserError: the folder holds no dataset, or one of another tokenizer.
        """
        if self._card is None:
            card = read_card(self.dataset)
            if card.tokenizer["sha256"] != self.tokenizer.sha256:
                raise UserError(
                    f"{self._other_tokenizer(card)}; configure that one, or give data.sources to prepare the data again"
                )
            self._card = card
        return self._card

    def _other_tokenizer(self, card: DatasetCard) -> str:
        """What tells the configured tokenizer from the dataset's, in words."""
        name, prepared_name = self.tokenizer_name, card.tokenizer["name"]
        if name != prepared_name:
            return f"data.tokenizer: {name} found, but {self.dataset} was prepared with {prepared_name}"
        found, prepared = asdict(self.tokenizer.special_tokens), card.tokenizer["special_tokens"]
        changed = [field for field in found if found[field] != prepared[field]]
        if changed:
            here, there = (", ".join(f"{field} {of[field]!r}" for field in changed) for of in (found, prepared))
            return f"data.special_tokens: {here} found, but {self.dataset} was prepared with {there}"
        return f"data.tokenizer: {name} found, but {self.dataset} was prepared with another file of that name"

    def prepare_data(self) -> None:
        """Make the dataset if it is missing or stale. Lightning calls this on one rank while the others wait.

        Raises:
            UserError: it cannot be made. Under a trainer that is left to `setup`, which all ranks reach.
        """
        if self.sources is None:
            return
        self._card = None
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
        damaged = damaged_chunks(self.dataset, self.card)
        if damaged:
            raise UserError(f"data chunk {damaged[0]}; prepare the dataset again")
        for split in _STAGE_SPLITS.get(stage, (self.predict_split,)):
            if stage == "fit" and split == "val" and split not in self.card.splits:
                continue
            self._check_split(split)

    def _check_split(self, split: str) -> None:
        if split not in self.card.splits:
            raise UserError(
                f"split {split!r} is empty: {self.dataset} has {', '.join(self.card.splits)}; "
                f"set data.{split}_fraction above 0 and give data.sources"
                if split in ("val", "test")
                else f"data.predict_split: {split!r} found, {self.dataset} has {', '.join(self.card.splits)}"
            )
        entry = self.card.splits[split]
        check_index(self.dataset / split, entry, self.card.dtype)
        ranks = self._world_size
        # A training batch is always whole, the last one of an evaluation need not be.
        needed = ranks * self.batch_size if split == "train" else ranks
        found = count_blocks(entry, self.seq_len)
        if found < needed:
            per_rank = f" of batch_size {self.batch_size}" if split == "train" else ""
            largest = largest_seq_len(entry, needed)
            cure = f"the largest that works is {largest}" if largest else "no context is short enough: give more data"
            raise UserError(
                f"data.seq_len: {self.seq_len} found; split {split!r} ({entry.tokens:,} tokens) has {found} blocks of "
                f"that length, {needed} are needed for {ranks} rank(s){per_rank}; {cure}"
            )

    @property
    def _world_size(self) -> int:
        return self.trainer.world_size if self.trainer is not None else 1

    def _dataset(self, split: str, order: Order) -> BlockDataset:
        return BlockDataset(
            (self.dataset / split).absolute(),
            self.card.split(split),
            self.seq_len,
            # A validation is the same one in runs of several seeds.
            seed=self.seed if order == "reshuffled" else 0,
            order=order,
            drop_last=order == "reshuffled",
            fingerprint=self.card.fingerprint,
        )

    def _loader(self, split: str, order: Order) -> BlockLoader:
        return BlockLoader(
            self._dataset(split, order),
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            collate_fn=Collate(self.document_mask),
            pin_memory=torch.cuda.is_available(),
        )

    def train_dataloader(self) -> BlockLoader:
        """Whole batches, in another order in each epoch."""
        return self._loader("train", "reshuffled")

    def val_dataloader(self) -> BlockLoader | list[BlockLoader]:
        """Every block, in one random order that is the same for every validation, run and seed: the first batches, all
        that `limit_val_batches` leaves, are of many documents. An empty list when no validation was asked for."""
        return self._loader("val", "shuffled") if "val" in self.card.splits else []

    def test_dataloader(self) -> BlockLoader:
        """Every block, in stored order."""
        return self._loader("test", "stored")

    def predict_dataloader(self) -> BlockLoader:
        """Every block of the split `predict_split`, in stored order."""
        return self._loader(self.predict_split, "stored")

    def training_blocks(self) -> Iterator[Block]:
        """The blocks that all ranks together read in a first epoch, in that order."""
        return self._blocks("train", "reshuffled")

    def validation_blocks(self) -> Iterator[Block]:
        """The blocks that all ranks together read in a validation, in that order."""
        return self._blocks("val", "shuffled")

    def _blocks(self, split: str, order: Order) -> Iterator[Block]:
        dataset = self._dataset(split, order)
        dataset.distributed_env = _DistributedEnv(world_size=1, global_rank=0, num_nodes=1)
        return iter(dataset)
