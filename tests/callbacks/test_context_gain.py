"""The gain against a loop that runs each piece alone, and what a model that copies gains."""

import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor

from muse_lightning.callbacks import ContextGain
from muse_lightning.callbacks.loss_by_position import tokens_in_sight
from muse_lightning.data.batches import cut_documents
from muse_lightning.errors import UserError
from tests.oracle import copies, nats_of, oracle_model
from tests.tiny import SEQ_LEN, TinyData, batches, scalars, tiny_model, tiny_trainer


def documents_of(batch: dict[str, Tensor]) -> list[tuple[int, int]]:
    """Ends in the flattened batch."""
    ends = batch["cu_seqlens"].tolist() if "cu_seqlens" in batch else [0, SEQ_LEN, 2 * SEQ_LEN]
    return [(start, end) for start, end in itertools.pairwise(ends) if end > start]


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "whole-rows"])
@pytest.mark.parametrize("pieces", [2, 5, 8])
def test_against_a_loop(tmp_path: Path, packed: bool, pieces: int) -> None:
    model, val = tiny_model(), batches(4, packed=packed)
    trainer = tiny_trainer(tmp_path, callbacks=[ContextGain(batches=3, pieces=pieces)])
    trainer.validate(model, TinyData([], val), verbose=False)
    length, gains = SEQ_LEN // pieces, []
    for batch in val[:3]:
        tokens, labels = batch["input_ids"].flatten(), batch["labels"].flatten()
        for start, end in documents_of(batch):
            with torch.no_grad():
                whole = model.llama(tokens[None, start:end]).log_softmax(-1)[0]
            for index in range(start, end):
                # Where its piece begins: at a multiple of the length in its row, or with its document.
                piece = max(start, index // SEQ_LEN * SEQ_LEN + index % SEQ_LEN // length * length)
                is_far = index - start + 1 > SEQ_LEN // 2 and index - piece + 1 > length // 2
                if is_far and labels[index] != -100:
                    with torch.no_grad():
                        alone = model.llama(tokens[None, piece : index + 1]).log_softmax(-1)[0, -1]
                    gains.append((whole[index - start] - alone)[labels[index]].item())
    assert len(gains) > 5
    assert scalars(trainer)["val/context_gain"][0][1] == pytest.approx(sum(gains) / len(gains), abs=1e-6)


def test_a_model_that_copies_from_afar_gains(tmp_path: Path) -> None:
    half = torch.randperm(200)[: SEQ_LEN // 2]
    tokens = torch.cat([half, half, half[:1]])[None].expand(2, -1)
    batch = {"input_ids": tokens[:, :-1].clone(), "labels": tokens[:, 1:].clone()}
    gains = []
    for memory in (10**6, 3):
        trainer = tiny_trainer(tmp_path / str(memory), callbacks=[ContextGain()])
        trainer.validate(oracle_model(200, copies(1, memory)), TinyData([], [batch]), verbose=False)
        gains.append(scalars(trainer)["val/context_gain"][0][1])
    assert gains == pytest.approx([nats_of(200, False) - nats_of(200, True), 0.0])


def test_both_are_in_the_precision_of_the_run(tmp_path: Path) -> None:
    model, [batch] = tiny_model(), batches(1)
    trainer = tiny_trainer(tmp_path, callbacks=[ContextGain()], precision="bf16-mixed")
    trainer.validate(model, TinyData([], [batch]), verbose=False)
    cut = {**batch, "cu_seqlens": cut_documents(batch, SEQ_LEN // 8)}
    compared = (batch["labels"] != -100) & (tokens_in_sight(batch) > SEQ_LEN // 2)
    compared &= tokens_in_sight(cut) > SEQ_LEN // 16
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        saved = model.token_nats(cut) - model.token_nats(batch)
    expected = saved[compared].mean().item()
    assert expected != 0
    assert scalars(trainer)["val/context_gain"][0][1] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("case", ["short-documents", "short-rows"])
def test_no_far_context_no_gain(tmp_path: Path, case: str, caplog: pytest.LogCaptureFixture) -> None:
    [batch] = batches(1, packed=False)
    batch["cu_seqlens"] = torch.tensor([*range(0, 2 * SEQ_LEN, 8), *[2 * SEQ_LEN] * 52], dtype=torch.int32)
    if case == "short-rows":
        batch = {name: tensor[:, :15] for name, tensor in batch.items() if name != "cu_seqlens"}
    trainer = tiny_trainer(tmp_path, callbacks=[ContextGain()])
    with caplog.at_level("INFO"):
        trainer.validate(tiny_model(), TinyData([], [batch]), verbose=False)
    assert "val/context_gain" not in scalars(trainer)
    line = "context gain: left out, no prediction sees more than half of the context and of its piece"
    assert caplog.messages.count(line) == 1


@pytest.mark.parametrize("options", [{"batches": 0}, {"pieces": 1}])
def test_mistakes(options: dict[str, int]) -> None:
    with pytest.raises(UserError, match=r"ContextGain: batches is \d, pieces \d; at least 1 and 2 are needed"):
        ContextGain(**options)
