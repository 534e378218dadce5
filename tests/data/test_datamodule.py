"""TokenDataModule: its checks, its fields from YAML, its life under a Trainer."""

from pathlib import Path

import lightning as L
import pytest
import torch
from jsonargparse import ArgumentParser

from muse_lightning.data import TokenDataModule
from muse_lightning.data.card import largest_seq_len
from muse_lightning.data.filters import Filters
from muse_lightning.data.sources import Folders, PythonPackages
from muse_lightning.data.tokenizer import SpecialTokens
from muse_lightning.errors import UserError

OTHER_SPECIAL = SpecialTokens(end="<eos>")

YAML = """
data:
  dataset: {dataset}
  sources:
  - class_path: Folders
    init_args:
      path: {repositories}
      suffixes: [.py]
  - class_path: muse_lightning.data.sources.PythonPackages
    init_args: {{installed: false}}
  seq_len: 64
  batch_size: 2
  filters: {{max_line_bytes: 300}}
  special_tokens: {{end: <eos>}}
"""


def test_fields_come_from_yaml(repositories, tmp_path):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(TokenDataModule, "data", fail_untyped=True)
    text = YAML.format(dataset=tmp_path / "set", repositories=repositories)
    config = parser.parse_string(text)
    data = parser.instantiate(config).data
    assert isinstance(data.sources[0], Folders)
    assert data.sources[0].rules.suffixes == (".py",)
    assert isinstance(data.sources[1], PythonPackages)
    assert data.preparation.filters == Filters(max_line_bytes=300)
    assert data.tokenizer.special_tokens.end == "<eos>"
    # What is printed reads back as the same.
    assert parser.parse_string(parser.dump(config)) == config
    assert "Context in tokens." in parser.format_help()


def test_paths_may_begin_with_the_home_folder(make_data, repositories, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    data = make_data(dataset=Path("~/set"), sources=[Folders(Path("~") / repositories.name)])
    data.prepare_data()
    assert (tmp_path / "set" / "dataset.json").exists()
    with pytest.raises(UserError, match=f"no file {tmp_path}/t.json"):
        make_data(tokenizer="~/t.json")


class Recorder(L.LightningModule):
    """Learns nothing and remembers what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen: list[list[list[int]]] = []
        self.validated = 0

    def training_step(self, batch, batch_idx):
        self.seen.append(batch["input_ids"].tolist())
        return self.weight.sum()

    def validation_step(self, batch, batch_idx):
        self.validated += len(batch["input_ids"])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(tmp_path, **arguments) -> L.Trainer:
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    return L.Trainer(accelerator="cpu", default_root_dir=tmp_path, num_sanity_val_steps=0, **{**quiet, **arguments})


@pytest.mark.parametrize(("saved_workers", "workers"), [(0, 0), (2, 0), (0, 2)])
def test_a_trainer_resumes_in_the_middle_of_an_epoch(make_data, tmp_path, saved_workers, workers):
    def fit(steps: int, num_workers: int, checkpoint=None) -> tuple[Recorder, L.Trainer]:
        model, run = Recorder(), trainer(tmp_path, max_steps=steps, max_epochs=-1, val_check_interval=3)
        run.fit(model, datamodule=make_data(num_workers=num_workers, seq_len=500), ckpt_path=checkpoint)
        return model, run

    whole, _ = fit(40, 0)
    first, run = fit(7, saved_workers)
    run.save_checkpoint(tmp_path / "a.ckpt")
    second, _ = fit(40, workers, tmp_path / "a.ckpt")
    assert first.seen + second.seen == whole.seen
    assert len(whole.seen) == 40
    assert len(make_data(seq_len=500).train_dataloader()) < 40, "more than one epoch"


def test_validation_sees_every_block(make_data, tmp_path):
    model, data = Recorder(), make_data(batch_size=3)
    trainer(tmp_path, max_steps=1).fit(model, datamodule=data)
    model.validated = 0
    trainer(tmp_path).validate(model, datamodule=data, verbose=False)
    assert model.validated == sum(chunk.tokens // 65 for chunk in data.card.splits["val"].chunks)


def test_fit_without_validation(make_data, tmp_path):
    model = Recorder()
    trainer(tmp_path, max_steps=2).fit(model, datamodule=make_data(val_fraction=0))
    assert len(model.seen) == 2
    assert model.validated == 0


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ("validate", r"split 'val' is empty: .* has train; set data.val_fraction above 0"),
        ("test", r"split 'test' is empty"),
        ("predict", r"data.predict_split: 'vla' found, .* has train"),
    ],
)
def test_a_split_that_is_not_there_is_named(make_data, stage, message):
    data = make_data(val_fraction=0, predict_split="vla")
    data.prepare_data()
    with pytest.raises(UserError, match=message):
        data.setup(stage)


@pytest.mark.parametrize(("ranks", "split"), [(1, "train"), (4, "train"), (2, "val")])
def test_too_few_blocks_names_the_largest_context(make_data, ranks, split, monkeypatch):
    data = make_data(seq_len=100_000)
    data.prepare_data()
    monkeypatch.setattr(TokenDataModule, "_world_size", ranks)
    stage = {"train": "fit", "val": "validate"}[split]
    needed = ranks * 2 if split == "train" else ranks
    largest = largest_seq_len(data.card.splits[split], needed)
    with pytest.raises(UserError) as error:
        data.setup(stage)
    message = str(error.value)
    assert message.startswith(f"data.seq_len: 100000 found; split '{split}'")
    assert f"has 0 blocks of that length, {needed} are needed for {ranks} rank(s)" in message
    hint = ", or prepare again with a larger data.val_fraction" if split == "val" else ""
    assert message.endswith(f"the largest that works is {largest}{hint}")
    assert "\n" not in message
    data.seq_len = largest
    if split == "train":
        data._check_split(split, ranks)
    else:
        data.setup(stage)
    data.seq_len = largest + 1
    with pytest.raises(UserError):
        data._check_split(split, ranks)


def test_more_ranks_than_tokens(make_data, monkeypatch):
    data = make_data()
    data.prepare_data()
    monkeypatch.setattr(TokenDataModule, "_world_size", 10**6)
    with pytest.raises(UserError, match="no context is short enough: give more data"):
        data.setup("fit")


def test_another_tokenizer_is_one_line(make_data):
    make_data().prepare_data()
    other = make_data(sources=None, special_tokens=OTHER_SPECIAL)
    other.prepare_data()
    with pytest.raises(
        UserError, match=r"special_tokens: end '<eos>' found, but .* was prepared with end '<\|endoftext\|>'; "
    ) as e:
        other.setup("fit")
    assert "\n" not in str(e.value)
    # With sources it is prepared again.
    again = make_data(special_tokens=OTHER_SPECIAL)
    again.prepare_data()
    again.setup("fit")


def test_no_dataset_and_no_sources(make_data, tmp_path):
    data = make_data(sources=None, dataset=tmp_path / "none")
    data.prepare_data()
    with pytest.raises(UserError, match=r"none is not a prepared dataset"):
        data.setup("fit")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seq_len": 0}, r"data.seq_len: 0 found, at least 1 expected"),
        ({"batch_size": 0}, r"data.batch_size: 0 found"),
        ({"num_workers": -1}, r"data.num_workers: -1 found, at least 0"),
        ({"val_fraction": 1.0}, r"1.0 \+ 0.0 found"),
        ({"test_fraction": -0.1}, r"0.2 \+ -0.1 found"),
    ],
)
def test_bad_fields_are_named(make_data, arguments, message):
    with pytest.raises(UserError, match=message):
        make_data(**arguments)


def test_what_the_model_is_linked_to(make_data):
    data = make_data()
    assert data.vocab_size == 259
    assert data.token_bytes.tolist() == [1] * 256 + [0] * 3
    assert data.token_bytes.dtype == torch.int64
