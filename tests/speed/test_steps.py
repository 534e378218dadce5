"""Steps of a recipe are those of its trainer; variants, tables and files of `muse bench training`."""

import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from muse_lightning.data.batches import IGNORED_LABEL
from muse_lightning.errors import UserError
from muse_lightning.speed.batches import random_batch
from muse_lightning.speed.recorder import TRACE_NAME, Recorder
from muse_lightning.speed.steps import Steps, time_steps
from tests.recipe import Muse
from tests.tiny import SEQ_LEN, VOCAB, tiny_model

TRAINER = {"accelerator": "cpu", "precision": "32-true", "accumulate_grad_batches": 2, "gradient_clip_val": 1.0}


def test_every_step_is_trained_and_timed(tmp_path: Path) -> None:
    model = tiny_model()
    batch = random_batch(VOCAB, 2, SEQ_LEN, None)
    found = time_steps(model, TRAINER, batch, warmup=1, steps=3, callbacks=[Recorder(tmp_path, skip=2)])
    assert len(found.seconds) == 3
    assert min(found.seconds) > 0
    assert found.peak_bytes is None
    assert model.tokens_seen == 4 * 2 * 2 * SEQ_LEN
    assert (tmp_path / TRACE_NAME).stat().st_size > 1000


@pytest.mark.parametrize(("warmup", "steps"), [(0, 1), (1, 0)])
def test_there_must_be_something_to_time(warmup: int, steps: int) -> None:
    with pytest.raises(UserError, match="must be at least 1"):
        time_steps(tiny_model(), TRAINER, random_batch(VOCAB, 1, SEQ_LEN, None), warmup, steps)


def test_documents_fill_the_rows() -> None:
    batch = random_batch(VOCAB, 2, 48, (30, 5))
    assert sorted(set(batch["cu_seqlens"].tolist())) == [0, 30, 35, 48, 78, 83, 96]
    assert "cu_seqlens" not in random_batch(VOCAB, 2, 48, None)
    assert (batch["labels"] != IGNORED_LABEL).all()
    assert torch.equal(batch["input_ids"][:, 1:], batch["labels"][:, :-1])


def test_a_recipe_beside_its_twin(muse: Muse) -> None:
    # Its exact layers have the model's window, its twin's do not.
    model = ("--model.exact_layers=[0]", "--model.exact_heads=1", "--model.config.sliding_window=8")
    options = (*model, "--bench.warmup=1", "--bench.steps=2", "--bench.recompute=[none, block]", "--bench.out=found")
    code, out, err = muse("bench", "training", "--config", "recipe.yaml", *options)
    assert code == 0, err
    header, *timed = [json.loads(line) for line in (muse.folder / "found/results.jsonl").read_text().splitlines()]
    assert header["model"]["config"]["hidden_size"] == 16
    assert [(each["attention"], each["recompute"]) for each in timed] == [
        *(("recipe", "none"), ("recipe", "block"), ("dense", "none"), ("dense", "block"))
    ]
    assert all(each["tokens_per_sec"] > 0 and len(each["steps"]["seconds"]) == 2 for each in timed)
    for each in timed:
        assert each["measured_peak_bytes"] is None  # on a processor
        assert each["predicted_peak_bytes"] == sum(v for name, v in each["predicted"].items() if name != "phase")
    assert timed[0]["predicted_peak_bytes"] > timed[1]["predicted_peak_bytes"] > 4 * 4 * 9808  # its parameters
    assert "predicted GiB" in out
    assert timed[0]["flops"] != timed[2]["flops"] == timed[2]["dense_flops"]
    weights = {each["flops"] - each["attention_flops"] for each in timed}
    assert len(weights) == 1, "all but attention is the same work"
    assert weights.pop() > 0
    assert "x dense" in out
    assert "| dense | block |" in (muse.folder / "found/results.md").read_text()
    assert not (muse.folder / "runs").exists()


def test_a_variant_that_does_not_fit_is_a_row_and_is_gone(muse: Muse, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[weakref.ref[Any]] = []
    alive: list[int] = []

    def time_one(model: Any, *arguments: Any) -> Steps:
        alive.append(sum(reference() is not None for reference in seen))
        seen.append(weakref.ref(model))
        if len(seen) == 1:
            raise torch.OutOfMemoryError("out of memory")
        return Steps([1.0], None)

    monkeypatch.setattr("muse_lightning.speed.training_bench.time_steps", time_one)
    code, out, err = muse("bench", "training", "--config", "recipe.yaml", "--bench.out=found")
    assert code == 0, err
    assert [line.split()[2:5] for line in out.splitlines()[1:3]] == [["out", "of", "memory"], ["64", "1.00", "1.000"]]
    assert alive == [0, 0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("bench", "training", "--bench.steps=0"), "bench.steps: 0 found, at least 1 expected"),
        (("bench", "training", "--bench.attention=[]"), "bench.attention: nothing found"),
        (("bench", "training", "--bench.documents=[0]"), "documents: lengths of at least 1 expected"),
        (("bench", "training", "--bench.recompute=[all]"), "bench.recompute"),
        (("bench", "training", "--bench.stepz=1"), "stepz"),
        (("bench", "training", "--bench.out=source"), "bench.out: source exists already"),
        (("profile", "--bench.repeats=0"), "bench.repeats: 0 found, at least 1 expected"),
        (("profile",), "muse profile needs an NVIDIA GPU"),
    ],
)
def test_mistakes(muse: Muse, arguments: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    verb = arguments[:2] if arguments[0] == "bench" else arguments[:1]
    assert message in muse.error(*verb, "--config", "recipe.yaml", *arguments[len(verb) :])
