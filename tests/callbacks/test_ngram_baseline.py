"""The three lines at the end of a fit, on the blocks that validation read."""

import math
import re
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from muse_lightning.callbacks import NgramBaseline
from muse_lightning.callbacks.ngram_baseline import _validated_blocks
from muse_lightning.data import TokenDataModule
from muse_lightning.data.sources import Folders
from muse_lightning.errors import UserError


class Uniform(L.LightningModule):
    """Gives every token the same probability, and reports bits per byte as any language model does."""

    def __init__(self, reports: bool = True) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.reports = reports

    def training_step(self, batch, batch_idx):
        return self.weight.sum()

    def on_validation_epoch_start(self):
        self.labels = self.bytes = 0

    def validation_step(self, batch, batch_idx):
        labels = batch["labels"][batch["labels"] != -100]
        self.labels += len(labels)
        self.bytes += int(self.trainer.datamodule.token_bytes[labels].sum())

    def on_validation_epoch_end(self):
        if self.reports:
            self.log("val/bpb", self.labels * math.log2(self.trainer.datamodule.vocab_size) / self.bytes)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.fixture
def data(tmp_path) -> TokenDataModule:
    for number in range(4):
        folder = tmp_path / "code" / f"repo{number}"
        folder.mkdir(parents=True)
        (folder / "a.py").write_text("".join(f"value = {i * (number + 3)}\n" for i in range(200)))
    return TokenDataModule(tmp_path / "set", [Folders(tmp_path / "code")], seq_len=50, batch_size=3, val_fraction=0.3)


def fit(tmp_path, data: TokenDataModule, callback: NgramBaseline, model: L.LightningModule | None = None, **arguments):
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=arguments.pop("max_steps", 2),
        val_check_interval=2,
        logger=CSVLogger(tmp_path, name="", version="log"),
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        callbacks=[callback],
        **arguments,
    )
    trainer.fit(model or Uniform(), datamodule=data)
    trainer.logger.save()
    log = tmp_path / "log" / "metrics.csv"
    return log.read_text() if log.exists() else ""


def printed_figures(text: str) -> list[float]:
    pattern = "".join(
        rf"{name}: +(.*) validation bits per byte\n" for name in ("unigram model", "bigram model", "this model")
    )
    match = re.search(pattern + "$", text)
    assert match is not None
    return [float(figure) for figure in match.groups()]


@pytest.mark.parametrize("limit", [1.0, 2])
def test_a_model_of_nothing_is_a_uniform_model_of_the_same_blocks(data, tmp_path, capsys, limit):
    """With no token counted, both baselines are uniform, so that all three must agree to the last digit."""
    fit(tmp_path, data, NgramBaseline(max_train_tokens=0), limit_val_batches=limit)
    unigram, bigram, model = printed_figures(capsys.readouterr().out)
    assert unigram == bigram == model > 8


@pytest.mark.parametrize(
    ("steps", "end"),
    [(4, "per byte\n"), (5, "per byte at step 4, its last validation\n")],
    ids=["at the end", "before"],
)
def test_names_the_step_of_a_validation_before_the_end(data, tmp_path, capsys, steps, end):
    fit(tmp_path, data, NgramBaseline(), max_steps=steps)
    assert capsys.readouterr().out.endswith(end)


def test_counting_helps_and_is_logged(data, tmp_path, capsys):
    log = fit(tmp_path, data, NgramBaseline())
    unigram, bigram, model = printed_figures(capsys.readouterr().out)
    assert bigram < unigram < model
    header = log.splitlines()[0]
    assert "baseline/unigram_bpb" in header
    assert "baseline/bigram_bpb" in header
    assert f"{unigram:.3f}"[:4] in log


@pytest.mark.parametrize(("ranks_per_block", "blocks"), [(1, 60), (2, 30), (4, 15)])
def test_what_ranks_share_is_read_once(ranks_per_block, blocks):
    trainer = SimpleNamespace(num_val_batches=[5], world_size=4)
    data = SimpleNamespace(batch_size=3, ranks_per_block=ranks_per_block)
    assert _validated_blocks(trainer, data) == blocks


def test_a_number_below_0_is_refused_before_the_fit():
    with pytest.raises(UserError, match=r"^NgramBaseline: max_train_tokens is -1; accepted: at least 0$"):
        NgramBaseline(max_train_tokens=-1)


@pytest.mark.parametrize("case", ["vocabulary", "no bpb"])
def test_says_why_it_is_skipped(data, tmp_path, capsys, case, monkeypatch):
    if case == "vocabulary":
        monkeypatch.setattr("muse_lightning.callbacks.ngram_baseline.MAX_BIGRAM_VOCAB", 100)
        fit(tmp_path, data, NgramBaseline())
        assert "n-gram baseline: skipped, a vocabulary of 259 is over 100" in capsys.readouterr().out
    else:
        fit(tmp_path, data, NgramBaseline(), Uniform(reports=False))
        assert "n-gram baseline: skipped, there is no val/bpb" in capsys.readouterr().out
