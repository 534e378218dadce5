"""Notes which blocks every rank trained on."""

import os
from pathlib import Path
from typing import IO, Any

import lightning as L

from muse_lightning.checkpoints.choice import report
from muse_lightning.checkpoints.preemption import Agreement
from muse_lightning.data import TokenDataModule
from muse_lightning.data.ledger import (
    FOLDER_NAME,
    batch_line,
    chained_hash,
    chained_hash_of,
    kept_lines,
    ledger_files,
    ledger_path,
)
from muse_lightning.files import atomic_write
from muse_lightning.training.log_step import ends_step


class Ledger(L.Callback):
    """Writes `ledger/rank<R>.jsonl`, a line for each batch (data/ledger.py), on every rank.

    When a run goes on from a checkpoint, the ledger is what the checkpoint's run had noted up to it: that of the same
    folder is cut back, that of another run's folder is copied. Of ranks that are no more, their files are kept by those
    that are.

    A line reaches the system when its batch ends: a killed process loses none. It reaches the disk when a checkpoint is
    saved: a machine that fails loses none that a resumed run would keep.

    A checkpoint has the chained hash of the batches in each file, from which its tokens are known without the files.
    Where these do not fit when a run goes on, a line says so.

    Args:
        folder: where the files go.

    Example:
        >>> trainer = L.Trainer(callbacks=[Ledger("ledger")])  # doctest: +SKIP
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._file: IO[str] | None = None
        self._batches = 0
        self._before: dict[int, Path] = {}
        # Chained hashes: of each file that this rank keeps, and of all as the checkpoint has them.
        self._hashes: dict[int, str] = {}
        self._saved_hashes: dict[int, str] = {}
        self._agreement = Agreement()

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        # Only rank 0 is sure to know the folder of the run.
        self.folder = Path(trainer.strategy.broadcast(str(self.folder)))
        # Now, while no rank has begun to write.
        self._before = ledger_files(self.folder)

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Find the ledger of the run that the checkpoint is of: that lies in its folder `checkpoints`."""
        self._saved_hashes = checkpoint.get("batch_hashes", {})
        if not self._before and trainer.ckpt_path:
            self._before = ledger_files(Path(trainer.ckpt_path).absolute().parent.parent / FOLDER_NAME)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take over what the checkpoint's run has noted, and begin."""
        data = trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(data, TokenDataModule):
            return
        self._agreement = Agreement()
        self._batches = data.batches_read
        self._hashes = {trainer.global_rank: ""}
        self.folder.mkdir(parents=True, exist_ok=True)
        for rank, path in self._before.items():
            if rank % trainer.world_size == trainer.global_rank:
                lines = list(kept_lines(path, self._batches))
                self._hashes[rank] = chained_hash_of(lines)
                if self._hashes[rank] != self._saved_hashes.get(rank, self._hashes[rank]):
                    report(
                        f"ledger: warning: {path} does not have the {self._batches} batches that the checkpoint "
                        f"{trainer.ckpt_path} was trained on"
                    )
                # A part does not have the hash of the checkpoint, which the next start says.
                atomic_write(ledger_path(self.folder, rank), "".join(lines), may_copy=True)
        self._file = ledger_path(self.folder, trainer.global_rank).open("a", encoding="utf-8")
        self._file.write(data.ledger_header(self._batches).to_line())
        self._file.flush()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: dict[str, Any], batch_idx: int
    ) -> None:
        """Note the batch. The steps that are counted by now include the one that it has just ended."""
        if self._file is None:
            return
        step = trainer.global_step + (0 if ends_step(trainer) else 1)
        self._file.write(batch_line(step, self._batches, batch["record"]))
        self._file.flush()
        rank = trainer.global_rank
        self._hashes[rank] = chained_hash(self._hashes[rank], batch["record"])
        self._batches += 1

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Bring what is noted to the disk before the checkpoint gets there, which has its hashes."""
        if self._file is not None:
            os.fsync(self._file.fileno())
        kept: dict[int, str] = {}
        for of_rank in self._agreement.gather(self._hashes):
            kept |= of_rank
        checkpoint["batch_hashes"] = dict(sorted(kept.items()))

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Close the file."""
        if self._file is not None:
            os.fsync(self._file.fileno())
            self._file.close()
            self._file = None
