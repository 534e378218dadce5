"""Needles asked of models that copy: one remembers everything, one only the last tokens."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from muse_lightning.callbacks import NeedleRetrieval
from muse_lightning.errors import UserError
from tests.oracle import copies, nats_of, oracle_model
from tests.tiny import TinyData, scalars, tiny_model, tiny_trainer

VOCAB, N = 500, 128


def random_batch(rows: int = 2, documents: list[int] | None = None, seed: int = 0) -> dict[str, Tensor]:
    """Random tokens, each row cut into documents of these lengths. None is told apart from None."""
    tokens = torch.randint(1, VOCAB, (rows, N + 1), generator=torch.Generator().manual_seed(seed))
    batch = {"input_ids": tokens[:, :-1].clone(), "labels": tokens[:, 1:].clone()}
    if documents is not None:
        offsets = torch.tensor(documents * rows).cumsum(0)
        batch["cu_seqlens"] = torch.cat([torch.tensor([0]), offsets, offsets[-1:].expand(70)]).to(torch.int32)
    return batch


def validate(folder: Path, val: list[dict[str, Tensor]], memory: int = 10**6, **options: Any) -> dict[str, float]:
    trainer = tiny_trainer(folder, callbacks=[NeedleRetrieval(needle_tokens=16, **options)])
    trainer.validate(oracle_model(VOCAB, copies(8, memory)), TinyData([], val), verbose=False)
    return {tag: points[-1][1] for tag, points in scalars(trainer).items() if tag.startswith("val/needle")}


@pytest.mark.parametrize("documents", [None, [128], [28, 100]], ids=["rows", "documents", "two-documents"])
def test_a_model_that_copies_finds_every_needle(tmp_path: Path, documents: list[int] | None) -> None:
    logged = validate(tmp_path, [random_batch(documents=documents)] * 2)
    depths = {f"val/needle_accuracy_depth_{percent}": 1.0 for percent in (10, 30, 50, 70, 90)}
    assert logged == depths | {
        "val/needle_accuracy_control": 0.0,
        "val/needle_gain": pytest.approx(nats_of(VOCAB, False) - nats_of(VOCAB, True)),
        "val/needle_rows": 2.0,
    }


@pytest.mark.parametrize("documents", [None, [28, 100]], ids=["rows", "documents"])
@pytest.mark.parametrize("memory", [40, 60, 80])
def test_depths_are_depths(tmp_path: Path, documents: list[int] | None, memory: int) -> None:
    """What is further back than the model remembers is not found."""
    depths = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
    logged = validate(tmp_path, [random_batch(documents=documents)], memory, depths=depths)
    length = 128 if documents is None else 100
    distances = [length - 16 - round(depth * (length - 32)) for depth in depths]
    found = [logged[f"val/needle_accuracy_depth_{round(100 * depth)}"] for depth in depths]
    assert found == [float(distance < memory) for distance in distances]
    assert 0 < sum(found) < len(depths)


def test_it_takes_a_pass_for_each_depth_and_the_control(tmp_path: Path) -> None:
    model = oracle_model(VOCAB, copies(8))
    trainer = tiny_trainer(tmp_path, callbacks=[NeedleRetrieval(needle_tokens=16, depths=(0.2, 0.7), batches=2)])
    trainer.validate(model, TinyData([], [random_batch(seed=seed) for seed in range(5)]), verbose=False)
    assert model.llama.calls == 5 + 2 * 2 * 3
    events = EventAccumulator(trainer.log_dir)
    events.Reload()
    assert len(events.Images("val/needle_accuracy")) == 1


def test_needles_are_asked_in_the_precision_of_the_run(tmp_path: Path) -> None:
    in_bfloat16: list[bool] = []
    model = oracle_model(VOCAB, lambda document: in_bfloat16.append(torch.is_autocast_enabled("cpu")))
    trainer = tiny_trainer(
        tmp_path, callbacks=[NeedleRetrieval(needle_tokens=16, depths=(0.5,))], precision="bf16-mixed"
    )
    trainer.validate(model, TinyData([], [random_batch()]), verbose=False)
    assert in_bfloat16 == [True] * 2 * N * 3  # a pass of the validation, two of the callback


def test_rows_alone_take_needles_from_the_batch_before(tmp_path: Path) -> None:
    logged = validate(tmp_path, [random_batch(1, seed=seed) for seed in range(4)], batches=2)
    assert (logged["val/needle_rows"], logged["val/needle_accuracy_depth_50"]) == (2.0, 1.0)


@pytest.mark.parametrize(
    ("batches", "left_out"),
    [
        ([random_batch(documents=[63, 65])], None),
        ([random_batch(documents=[64, 64])], None),
        ([random_batch(documents=[63, 63, 2])], "2 of 2"),
        ([random_batch(1)], "no pool"),
        ([{name: torch.ones_like(tensor) for name, tensor in random_batch().items()}], "2 of 2"),
    ],
    ids=["one-over-half", "halves", "under-half", "one-row", "one-token"],
)
def test_rows_without_a_needle_are_left_out(
    tmp_path: Path, batches: list[dict[str, Tensor]], left_out: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        logged = validate(tmp_path, batches)
    notes = [record.message for record in caplog.records if record.message.startswith("needle retrieval")]
    if left_out is None:
        assert (logged["val/needle_rows"], notes) == (2.0, [])
    elif left_out == "no pool":
        assert not logged
        assert notes == ["needle retrieval: left out, the validation has no second document to take needles from"]
    else:
        assert not logged
        assert notes == [
            f"needle retrieval: {left_out} rows left out: no document of 0.5 of the context and 64 tokens, or no other "
            "text to hide in it"
        ]


@pytest.mark.parametrize(("min_share", "rows"), [(0.78, 2.0), (0.79, None)])
def test_how_long_a_document_must_be(tmp_path: Path, min_share: float, rows: float | None) -> None:
    logged = validate(tmp_path, [random_batch(documents=[28, 100])], min_share=min_share)
    assert logged.get("val/needle_rows") == rows


def test_special_tokens_are_no_needles(tmp_path: Path) -> None:
    token_bytes = torch.ones(VOCAB, dtype=torch.int64)
    token_bytes[: VOCAB // 2] = 0  # half of all tokens: no span of 16 is without one
    trainer = tiny_trainer(tmp_path, callbacks=[NeedleRetrieval(needle_tokens=16)])
    trainer.validate(
        oracle_model(VOCAB, copies(8)), TinyData([], [random_batch()], token_bytes=token_bytes), verbose=False
    )
    assert "val/needle_rows" not in scalars(trainer)


def test_the_same_each_time_and_apart_from_the_global_seed(tmp_path: Path) -> None:
    logged = []
    for number, seed in enumerate([0, 0, 1]):
        torch.manual_seed(0)
        model = tiny_model(config={"vocab_size": VOCAB, "max_position_embeddings": N}, seq_len=N)
        model.configure_model()
        torch.manual_seed(number)
        state = torch.get_rng_state()
        trainer = tiny_trainer(tmp_path / str(number), callbacks=[NeedleRetrieval(needle_tokens=16, seed=seed)])
        trainer.validate(model, TinyData([], [random_batch(documents=[28, 100])]), verbose=False)
        assert torch.equal(torch.get_rng_state(), state)
        logged.append(scalars(trainer)["val/needle_gain"])
        assert math.isfinite(logged[-1][0][1])
    assert logged[0] == logged[1] != logged[2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depths": []}, r"depths are \[\]; accepted: different fractions from 0 to 1"),
        ({"depths": [0.5, 1.1]}, r"depths are \[0.5, 1.1\]"),
        ({"depths": [0.5, 0.501]}, r"depths are \[0.5, 0.501\]"),
        ({"needle_tokens": 0}, "needle_tokens is 0; accepted: an even number, at least 2"),
        ({"needle_tokens": 15}, "needle_tokens is 15"),
        ({"batches": 0}, "batches is 0; it must be at least 1"),
        ({"min_share": 0.0}, "min_share is 0.0; it must be above 0 and at most 1"),
    ],
)
def test_mistakes(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"NeedleRetrieval: {message}"):
        NeedleRetrieval(**options)
