"""The ledger of a run is what the model saw, cut back and carried on at a resume."""

import hashlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch

from muse_lightning.callbacks.ledger import Ledger
from muse_lightning.data import TokenDataModule
from muse_lightning.data.ledger import LedgerBatch, LedgerHeader, kept_lines, ledger_path, read_ledger
from tests.tiny import TinyData, batches, tiny_model, tiny_trainer


class Recorder(L.LightningModule):
    """Learns nothing and remembers what it was given, by optimizer step."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen: list[tuple[int, str]] = []

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        self.seen.append((self.global_step + 1, batch["record"]))
        return self.weight.sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(dataset: Path, run: Path, steps: int, checkpoint: Path | None = None, **options: Any) -> Recorder:
    """Train to a step, with a ledger in the run's folder and a checkpoint at the end."""
    model = Recorder()
    trainer = tiny_trainer(run, max_steps=steps, limit_val_batches=0, callbacks=[Ledger(run / "ledger")], **options)
    trainer.fit(model, datamodule=TokenDataModule(str(dataset), seq_len=300, batch_size=2), ckpt_path=checkpoint)
    trainer.save_checkpoint(run / "checkpoints" / f"step={steps}.ckpt")
    return model


def entries(run: Path) -> tuple[list[LedgerHeader], list[LedgerBatch]]:
    found = list(read_ledger(ledger_path(run / "ledger", 0)))
    headers = [entry for entry in found if isinstance(entry, LedgerHeader)]
    return headers, [entry for entry in found if isinstance(entry, LedgerBatch)]


def test_every_batch_is_noted_with_its_step(prepared: Path, tmp_path: Path) -> None:
    model = fit(prepared, tmp_path, 20, accumulate_grad_batches=3)
    (header,), noted = entries(tmp_path)
    assert (header.rank, header.world_size, header.batch_size, header.seq_len) == (0, 1, 2, 300)
    assert header.datasets[0].name == str(prepared)
    assert [entry.batch for entry in noted] == list(range(len(model.seen)))
    assert [entry.step for entry in noted] == [step for step, _ in model.seen]
    for entry, (_, record) in zip(noted, model.seen, strict=True):
        assert record.startswith(f'"hash":"{entry.hash}","blocks":[[')


@pytest.mark.parametrize("same_folder", [True, False])
def test_a_resumed_run_goes_on_where_the_checkpoint_is(prepared: Path, tmp_path: Path, same_folder: bool) -> None:
    whole = fit(prepared, tmp_path / "whole", 20)
    run = tmp_path / "run"
    fit(prepared, run, 6)
    fit(prepared, run, 9, run / "checkpoints" / "step=6.ckpt")
    # Three steps, two of them after the checkpoint that is resumed, are seen again.
    again = run if same_folder else tmp_path / "again"
    fit(prepared, again, 20, run / "checkpoints" / "step=6.ckpt")
    headers, noted = entries(again)
    assert [header.batch for header in headers] == [0, 6]
    _, expected = entries(tmp_path / "whole")
    assert noted == expected
    assert len(noted) == len(whole.seen) == 20
    ends = [
        torch.load(folder / "checkpoints" / "step=20.ckpt", weights_only=True) for folder in (again, tmp_path / "whole")
    ]
    chained = ""
    for entry in expected:
        chained = hashlib.blake2b(f"{chained}{entry.hash}".encode(), digest_size=16).hexdigest()
    assert ends[0]["batch_hashes"] == ends[1]["batch_hashes"] == {0: chained}


def test_a_ledger_of_other_batches_is_told_of(
    prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(prepared, tmp_path, 4)
    path, checkpoint = ledger_path(tmp_path / "ledger", 0), tmp_path / "checkpoints" / "step=4.ckpt"
    fit(prepared, tmp_path, 5, checkpoint)
    assert "warning" not in capsys.readouterr().err
    header, first, *rest = path.read_text().splitlines(keepends=True)
    path.write_text("".join([header, first.replace('"hash":"', '"hash":"0'), *rest]))
    fit(prepared, tmp_path, 5, checkpoint)
    line = f"ledger: warning: {path} does not have the 4 batches that the checkpoint {checkpoint} was trained on\n"
    assert line in capsys.readouterr().err


def test_a_checkpoint_without_a_ledger_begins_one(prepared: Path, tmp_path: Path) -> None:
    fit(prepared, tmp_path / "first", 4)
    checkpoint = (tmp_path / "first" / "checkpoints" / "step=4.ckpt").rename(tmp_path / "moved.ckpt")
    fit(prepared, tmp_path / "second", 6, checkpoint)
    (header,), noted = entries(tmp_path / "second")
    assert header.batch == 4
    assert [entry.batch for entry in noted] == [4, 5]


def test_files_of_ranks_that_are_no_more_are_kept(prepared: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    fit(prepared, run, 6)
    other = ledger_path(run / "ledger", 1)
    other.write_text(ledger_path(run / "ledger", 0).read_text())
    expected = "".join(kept_lines(other, 4))
    checkpoint = run / "checkpoints" / "step=4.ckpt"
    fit(prepared, run, 4)
    other.write_text(ledger_path(run / "ledger", 0).read_text() + "torn")
    fit(prepared, tmp_path / "again", 5, checkpoint)
    assert ledger_path(tmp_path / "again" / "ledger", 1).read_text() == expected


def test_other_data_modules_have_no_ledger(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, max_steps=1, callbacks=[Ledger(tmp_path / "ledger")])
    trainer.fit(tiny_model(), TinyData(batches(1)))
    assert not (tmp_path / "ledger").exists()


def test_a_line_is_on_its_way_when_its_batch_ends(prepared: Path, tmp_path: Path) -> None:
    """A kill loses no line: nothing waits in the process."""
    data = TokenDataModule(str(prepared), seq_len=300, batch_size=2)
    ledger = Ledger(tmp_path)
    trainer: Any = SimpleNamespace(
        datamodule=data, world_size=1, global_rank=0, global_step=1, ckpt_path=None,
        strategy=SimpleNamespace(broadcast=lambda value: value),
        fit_loop=SimpleNamespace(_should_accumulate=lambda: False),
    )  # fmt: skip
    ledger.setup(trainer, tiny_model(), "fit")
    ledger.on_train_start(trainer, tiny_model())
    for number, batch in zip(range(3), data.train_dataloader(), strict=False):
        ledger.on_train_batch_end(trainer, tiny_model(), None, batch, number)
        assert len(ledger_path(tmp_path, 0).read_text().splitlines()) == number + 2
    ledger.teardown(trainer, tiny_model(), "fit")
