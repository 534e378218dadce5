"""Names of a repository written by hand, asked of a model that knows exactly some of its tokens."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from muse_lightning.callbacks import IdentifierRecall
from muse_lightning.data.tokenizer import ByteTokenizer
from muse_lightning.errors import UserError
from tests.oracle import nats_of, oracle_model
from tests.tiny import TinyData, scalars, tiny_trainer

VOCAB = 259
FILES = [
    "a.py\ndef load_all(): pass\ndef near_by(): pass\n" + "#" * 80 + "\n",
    "b.py\nnew_name(load_all, near_by)\n" + "#" * 200 + "\n",
    "c.py\nother_name = 1\n",
]
TEXT = "repo" + "".join("\x01" + text for text in FILES)
"""One character per token, the separator of files included."""


def tokens() -> list[int]:
    return [257 if char == "\x01" else ord(char) for char in TEXT]


def batch_of(ids: list[int], documents: bool) -> dict[str, Tensor]:
    row = torch.tensor([[*ids, 258]])
    batch = {"input_ids": row[:, :-1].clone(), "labels": row[:, 1:].clone()}
    if documents:
        batch["cu_seqlens"] = torch.tensor([0] + [len(ids)] * 63, dtype=torch.int32)
    return batch


def knows(*names: str) -> Any:
    """A model that knows the tokens after the first, and no others, where these names stand for the last time."""
    places = {TEXT.rindex(name) + i for name in names for i in range(1, len(name))}
    return lambda document: ord(TEXT[len(document)]) if len(document) in places else None


def validate(folder: Path, next_token: Any, documents: bool = True, **options: Any) -> dict[str, float]:
    trainer = tiny_trainer(folder, callbacks=[IdentifierRecall(**options)])
    data = TinyData([], [batch_of(tokens(), documents)] * 2)
    data.tokenizer = ByteTokenizer()
    trainer.validate(oracle_model(VOCAB, next_token), data, verbose=False)
    found = {tag: points[-1][1] for tag, points in scalars(trainer).items()}
    return {
        tag.removeprefix("val/identifier_"): value for tag, value in found.items() if tag.startswith("val/identifier_")
    }


@pytest.mark.parametrize("documents", [True, False], ids=["documents", "rows"])
def test_what_the_model_knows(tmp_path: Path, documents: bool) -> None:
    known, unknown = nats_of(VOCAB, True), nats_of(VOCAB, False)
    distances = {name: TEXT.rindex(name) - TEXT.index(name) for name in ("load_all", "near_by")}
    assert 64 <= distances["near_by"] < 128 <= distances["load_all"] < 256
    logged = validate(tmp_path, knows("load_all", "other_name"), documents, min_distance=10)
    # load_all has 7 tokens after its first, near_by 6; new_name 7, other_name 9; two batches alike.
    assert logged == {
        "accuracy": pytest.approx(7 / 13),
        "nats": pytest.approx((7 * known + 6 * unknown) / 13),
        "count": 4,
        "accuracy_128": 1.0,
        "nats_128": pytest.approx(known, abs=1e-6),
        "count_128": 2,
        "accuracy_64": 0.0,
        "nats_64": pytest.approx(unknown),
        "count_64": 2,
        "accuracy_control": pytest.approx(9 / 16),
        "nats_control": pytest.approx((9 * known + 7 * unknown) / 16),
        "count_control": 4,
    }


def test_documents_are_told_apart(tmp_path: Path) -> None:
    """Behind another document in the same row; this model knows places in its document."""
    before = [*b"another text", 258]
    batch = batch_of([*before, *tokens()], documents=True)
    batch["cu_seqlens"][1] = len(before)
    trainer = tiny_trainer(tmp_path, callbacks=[IdentifierRecall(min_distance=10)])
    data = TinyData([], [batch])
    data.tokenizer = ByteTokenizer()
    trainer.validate(oracle_model(VOCAB, knows("load_all", "near_by")), data, verbose=False)
    assert scalars(trainer)["val/identifier_accuracy"] == [(0, 1.0)]


def test_names_are_asked_in_the_precision_of_the_run(tmp_path: Path) -> None:
    in_bfloat16: list[bool] = []
    trainer = tiny_trainer(tmp_path, callbacks=[IdentifierRecall(min_distance=10)], precision="bf16-mixed")
    data = TinyData([], [batch_of(tokens(), True)])
    data.tokenizer = ByteTokenizer()
    model = oracle_model(VOCAB, lambda document: in_bfloat16.append(torch.is_autocast_enabled("cpu")))
    trainer.validate(model, data, verbose=False)
    assert in_bfloat16 == [True] * 2 * len(tokens())


def test_batches_and_distance(tmp_path: Path) -> None:
    logged = validate(tmp_path, knows(), min_distance=128, batches=1)
    assert (logged["count"], logged["count_control"]) == (1, 2)


def test_a_figure(tmp_path: Path) -> None:
    validate(tmp_path, knows(), min_distance=10)
    events = EventAccumulator(str(tmp_path / "run" / "version_0"))
    events.Reload()
    assert len(events.Images("val/identifier_recall")) == 1


@pytest.mark.parametrize(
    "ids", [list(b"x" * 50), tokens()[: TEXT.index("(load_all")]], ids=["no-names", "the-control-alone"]
)
def test_nothing_to_find(tmp_path: Path, ids: list[int], caplog: pytest.LogCaptureFixture) -> None:
    trainer = tiny_trainer(tmp_path, callbacks=[IdentifierRecall()])
    data = TinyData([], [batch_of(ids, True)])
    data.tokenizer = ByteTokenizer()
    with caplog.at_level("INFO"):
        trainer.validate(oracle_model(VOCAB, knows()), data, verbose=False)
    assert not [tag for tag in scalars(trainer) if "identifier" in tag]
    assert [line for line in caplog.messages if line.startswith("identifier recall")] == [
        "identifier recall: left out, no file mentions a name, at a distance of at least 256 tokens, that an earlier "
        "file of its document defines"
    ]


def test_data_without_a_tokenizer(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = tiny_trainer(tmp_path, callbacks=[IdentifierRecall()])
    with caplog.at_level("INFO"):
        trainer.validate(oracle_model(VOCAB, knows()), TinyData([], [batch_of(tokens(), True)]), verbose=False)
    assert not [tag for tag in scalars(trainer) if "identifier" in tag]
    assert "identifier recall: left out, the data has no tokenizer" in caplog.messages


@pytest.mark.parametrize("options", [{"batches": 0}, {"min_distance": 0}])
def test_mistakes(options: dict[str, int]) -> None:
    with pytest.raises(UserError, match=r"IdentifierRecall: min_distance is \d+, batches \d; both must be at least 1"):
        IdentifierRecall(**options)
