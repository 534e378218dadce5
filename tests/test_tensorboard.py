"""All that a fit writes for TensorBoard is read back, and its values computed anew from what the run had in hand."""

import json
import math
import time
from collections.abc import Callable
from copy import deepcopy
from io import BytesIO
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from torch.nn import functional as F

from muse_lightning.attention import Dense
from muse_lightning.measure.attention_error import attention_errors
from muse_lightning.training.module import LanguageModel
from tests.recipe import Muse

STEPS, EVERY = 4, 2
ROWS, SEQ_LEN = 2, 32
FLAGS = (
    f"--trainer.val_check_interval={EVERY}",
    "--trainer.check_val_every_n_epoch=null",
    "--trainer.limit_val_batches=2",
    "--model.exact_val_batches=2",
    "--trainer.callbacks+=NgramBaseline",
    # Of a training that learns something in four steps.
    "--model.learning_rate=0.1",
)
SAME = {"rel": 1e-5}
"""Of sums in float32 in another order."""

Batch = dict[str, Tensor]
Value = Callable[[LanguageModel, list[Batch]], float]


class Recorded:
    """What a run had in hand at each step: its parameters, a batch, a learning rate."""

    def __init__(self) -> None:
        self.model: LanguageModel | None = None
        self.training: list[tuple[dict[str, Tensor], Batch, float]] = []
        self.validation: list[tuple[dict[str, Tensor], list[Batch]]] = []

    def with_parameters(self, parameters: dict[str, Tensor]) -> LanguageModel:
        assert self.model is not None
        self.model.load_state_dict(parameters)
        return self.model


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Recorded:
    record = Recorded()
    train, validate = LanguageModel.training_step, LanguageModel.validation_step

    def training_step(self: LanguageModel, batch: Any, batch_idx: int) -> Tensor:
        record.model = self
        rate = self.trainer.optimizers[0].param_groups[0]["lr"]
        record.training.append((deepcopy(self.state_dict()), batch, rate))
        return train(self, batch, batch_idx)

    def validation_step(self: LanguageModel, batch: Any, batch_idx: int) -> Any:
        if batch_idx == 0:
            record.validation.append((deepcopy(self.state_dict()), []))
        record.validation[-1][1].append(batch)
        return validate(self, batch, batch_idx)

    monkeypatch.setattr(LanguageModel, "training_step", training_step)
    monkeypatch.setattr(LanguageModel, "validation_step", validation_step)
    return record


def nats(model: LanguageModel, batch: Batch) -> Tensor:
    """Of each label, [B, N], from all logits at once; 0 where there is no label."""
    logits = model.llama(batch["input_ids"], cu_seqlens=batch["cu_seqlens"])
    return F.cross_entropy(logits.float().transpose(1, 2), batch["labels"], ignore_index=-100, reduction="none")


def loss(model: LanguageModel, batches: list[Batch]) -> float:
    total = sum(nats(model, batch).sum() for batch in batches)
    return float(total / sum((batch["labels"] != -100).sum() for batch in batches))


def gradient_norm(model: LanguageModel, batches: list[Batch]) -> float:
    (batch,) = batches
    model.zero_grad()
    (nats(model, batch).sum() / batch["labels"].numel()).backward()
    squares = [parameter.grad.double().square().sum() for parameter in model.parameters()]
    model.zero_grad()
    return float(torch.stack(squares).sum().sqrt())


def bits_per_byte(model: LanguageModel, batches: list[Batch]) -> float:
    # The tokenizer of the recipe: an id is a byte, or above 255 a special token.
    labels = torch.cat([batch["labels"] for batch in batches])
    total = sum(nats(model, batch).sum() for batch in batches)
    return float(total / math.log(2) / ((labels >= 0) & (labels < 256)).sum())


def exact_loss(model: LanguageModel, batches: list[Batch]) -> float:
    with model.llama.attention_as(Dense):
        return loss(model, batches)


def loss_in_sight_of(least: int, below: int) -> Value:
    """The loss of predictions that see at least so many tokens, and less than so many."""

    def value(model: LanguageModel, batches: list[Batch]) -> float:
        kept = []
        for batch in batches:
            starts, in_sight = set(batch["cu_seqlens"].tolist()), 0
            each = nats(model, batch).flatten()
            for place, label in enumerate(batch["labels"].flatten().tolist()):
                in_sight = 1 if place in starts else in_sight + 1
                if label != -100 and least <= in_sight < below:
                    kept.append(float(each[place]))
        return sum(kept) / len(kept)

    return value


def errors_of_attention(model: LanguageModel, batches: list[Batch]) -> Tensor:
    return attention_errors(model.llama, batches[0]["input_ids"], batches[0]["cu_seqlens"])


AT_TRAINING: dict[str, Value] = {"train/loss": loss, "train/grad_norm": gradient_norm}
AT_VALIDATION: dict[str, Value] = {
    "val/loss": loss,
    "val/ppl": lambda model, batches: math.exp(loss(model, batches)),
    "val/bpb": bits_per_byte,
    "val/loss_exact": exact_loss,
    "val/loss_short": loss,
    "val/loss_long": loss_in_sight_of(SEQ_LEN // 2 + 1, SEQ_LEN + 1),
    **{f"val/loss_by_position/{2**i}": loss_in_sight_of(2**i, 2 ** (i + 1)) for i in range(6)},
    "muse/relative_error": lambda model, batches: float(errors_of_attention(model, batches).mean()),
    "muse/relative_error_layer_0": lambda model, batches: float(errors_of_attention(model, batches)[0]),
    "muse/relative_error_layer_1": lambda model, batches: float(errors_of_attention(model, batches)[1]),
}
PHASES = ("data", "forward", "backward", "optimizer")


def read(run: Path) -> EventAccumulator:
    return EventAccumulator(str(run), size_guidance={"scalars": 0, "images": 0, "tensors": 0}).Reload()


def test_every_tag_has_the_value_that_it_says(muse_with_dataset: Muse, recorded: Recorded) -> None:
    began = time.perf_counter()
    code, out, err = muse_with_dataset.with_recipe("fit", f"--trainer.max_steps={STEPS}", *FLAGS)
    seconds = time.perf_counter() - began
    assert code == 0, err
    run = Path("runs/tiny/version_0")
    events = read(run)
    scalars = {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in events.Tags()["scalars"]}
    # Lightning counts a step from 0, and a validation as the step before it.
    steps, validations = list(range(STEPS)), list(range(EVERY - 1, STEPS, EVERY))
    expected: dict[str, list[float]] = {}

    assert [len(recorded.training), len(recorded.validation)] == [STEPS, STEPS // EVERY]
    for tag, value in AT_TRAINING.items():
        expected[tag] = [value(recorded.with_parameters(state), [batch]) for state, batch, _ in recorded.training]
    assert recorded.model is not None
    recorded.model.eval()
    for tag, value in AT_VALIDATION.items():
        with torch.no_grad():
            expected[tag] = [value(recorded.with_parameters(state), batches) for state, batches in recorded.validation]
    assert all(0 < error < 1 for error in expected["muse/relative_error"])
    assert expected["val/loss"] != pytest.approx(expected["val/loss_exact"], rel=10 * SAME["rel"]), "no approximation"
    expected |= {f"lr-AdamW/pg{group}": [rate for *_, rate in recorded.training] for group in (1, 2)}
    expected["train/tokens"] = [(step + 1) * ROWS * SEQ_LEN for step in steps]
    expected |= {f"train/{name}": [0.0] * STEPS for name in ("skipped_steps", "consecutive_skipped_steps")}
    for tag, values in expected.items():
        at = validations if tag.startswith(("val/", "muse/")) else steps
        assert scalars.pop(tag) == pytest.approx(dict(zip(at, values, strict=True)), **SAME), tag

    times = {phase: scalars.pop(f"time/{phase}") for phase in ("step", *PHASES)}
    for step in steps:
        parts = [times[phase][step] for phase in PHASES]
        assert min(parts) > 0
        assert times["step"][step] >= sum(parts) * (1 - 1e-6)
    assert sum(times["step"].values()) < seconds
    rates = scalars.pop("throughput/device/tokens_per_sec")
    # Its clock also runs while callbacks do.
    assert all(0 < rates[step] <= 1.01 * ROWS * SEQ_LEN / times["forward"][step] for step in steps)
    resident, peaks = scalars.pop("memory/allocated_gib"), scalars.pop("memory/peak_gib")
    assert list(peaks.values()) == [max(list(resident.values())[: step + 1]) for step in steps]
    assert 0.05 < peaks[STEPS - 1] < psutil.virtual_memory().total / 2**30
    printed = dict(line.split(": ") for line in out.splitlines() if " model: " in line)
    for name in ("unigram", "bigram"):
        (value,) = scalars.pop(f"baseline/{name}_bpb").values()
        assert f"{value:.3f} validation bits per byte" == printed[f"{name} model"].strip()
    assert set(scalars.pop("epoch").values()) == {0.0}
    assert scalars == {}

    assert events.Tags()["images"] == ["val/loss_by_position"]
    figures = events.Images("val/loss_by_position")
    assert [figure.step for figure in figures] == validations
    for figure in figures:
        picture = Image.open(BytesIO(figure.encoded_image_string))
        assert picture.size == (figure.width, figure.height) == (600, 400)
        assert len(picture.convert("RGB").getcolors(10**6)) > 10, "a curve, and not a blank"

    assert set(events.Tags()["tensors"]) == {
        "custom_scalars__config__",
        "run/config/text_summary",
        "run/environment/text_summary",
    }
    assert text(events, "run/config") == {0: f"```yaml\n{(run / 'config.yaml').read_text().rstrip()}\n```"}
    environment = json.loads(text(events, "run/environment")[0].removeprefix("```json").removesuffix("```"))
    on_disk = json.loads((run / "environment.json").read_text())
    assert environment == {name: on_disk[name] for name in on_disk if name not in ("distributions", "data")}


def text(events: EventAccumulator, tag: str) -> dict[int, str]:
    found = events.Tensors(f"{tag}/text_summary")
    return {event.step: event.tensor_proto.string_val[0].decode() for event in found}


def test_a_run_that_is_resumed_keeps_what_it_had_written(muse_with_dataset: Muse) -> None:
    for steps, start in ((STEPS, []), (STEPS + EVERY, ["--resume"])):
        assert muse_with_dataset.with_recipe("fit", f"--trainer.max_steps={steps}", *FLAGS, *start)[0] == 0
    events = read(Path("runs/tiny/version_0"))
    validations = list(range(EVERY - 1, STEPS + EVERY, EVERY))
    assert [event.step for event in events.Scalars("val/loss")] == validations
    assert [event.step for event in events.Images("val/loss_by_position")] == validations
    assert [event.step for event in events.Scalars("train/loss")] == list(range(STEPS + EVERY))
    assert list(text(events, "run/config")) == [0, STEPS]
    assert f"max_steps: {STEPS + EVERY}" in text(events, "run/config")[STEPS]
