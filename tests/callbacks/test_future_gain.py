"""The gain of models that look ahead, of those that cannot, and against a loop over tokens."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from muse_lightning.callbacks import FutureGain
from muse_lightning.errors import UserError
from tests.tiny import SEQ_LEN, VOCAB, TinyData, batches, scalars, tiny_model, tiny_muse, tiny_trainer

PEEK = 5.0


def gain(folder: Path, model: object, val: list[dict[str, Tensor]], callback: FutureGain) -> list[float]:
    trainer = tiny_trainer(folder, callbacks=[callback])
    trainer.validate(model, TinyData([], val), verbose=False)
    found = scalars(trainer)
    return [found[tag][0][1] for tag in ("val/future_gain", "val/future_gain_error")]


class Peeking(torch.nn.Module):
    """In place of a Llama: the logit of whatever token stands next is PEEK, the others' are 0."""

    def __init__(self) -> None:
        super().__init__()
        self.lm_head = torch.nn.Linear(VOCAB, VOCAB, bias=False)
        torch.nn.init.eye_(self.lm_head.weight)

    def hidden_states(self, input_ids: Tensor, *, cu_seqlens: Tensor | None = None) -> Tensor:
        return PEEK * torch.nn.functional.one_hot(input_ids.roll(-1, 1), VOCAB).float()


def test_a_model_that_peeks(tmp_path: Path) -> None:
    model = tiny_model(exact_val_batches=0, seq_len=None)
    model.llama = Peeking()
    # Of two alternating texts no token is right for the other.
    rows = torch.arange(SEQ_LEN + 1)[None].expand(2, -1)
    val = [
        {"input_ids": tokens[:, :-1].clone(), "labels": tokens[:, 1:].clone()}
        for tokens in ((rows + shift) % VOCAB for shift in (0, 7, 0))
    ]
    for batch in val:
        batch["labels"][:, -1] = -100  # nothing stands behind it
    mean, error = gain(tmp_path, model, val, FutureGain())
    assert mean == pytest.approx(PEEK)
    assert error == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "whole-rows"])
def test_exact_attention_gains_nothing(tmp_path: Path, packed: bool) -> None:
    mean, error = gain(tmp_path, tiny_model(), batches(3, packed=packed), FutureGain())
    assert abs(mean) < 1e-6
    assert error < 1e-6


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "whole-rows"])
def test_muse_against_a_loop(tmp_path: Path, packed: bool) -> None:
    """All tokens of the second half, from the definition, against a sample of them with its own error."""
    # So large that attention selects.
    config = {"initializer_range": 0.5}
    model, val = tiny_model(config=config, attention=tiny_muse, exact_val_batches=0), batches(3, packed=packed)
    mean, error = gain(tmp_path, model, val, FutureGain(tokens=200))
    saved = []
    for before, batch in zip(val, val[1:], strict=False):
        for row in range(2):
            for at in range(SEQ_LEN // 2, SEQ_LEN):
                if (label := batch["labels"][row, at]) == -100:
                    continue
                changed = batch["input_ids"].clone()
                changed[:, at + 1 :] = before["input_ids"][:, at + 1 :]
                nats = [
                    -model.llama(ids, cu_seqlens=batch.get("cu_seqlens"))[row, at].log_softmax(-1)[label].item()
                    for ids in (changed, batch["input_ids"])
                ]
                saved.append(nats[0] - nats[1])
    assert max(map(abs, saved)) > 1e-3
    deviation = torch.tensor(saved).std().item()
    # 200 x 2 rows x 2 batches, drawn with replacement
    assert error == pytest.approx(deviation / 800**0.5, rel=0.3)
    assert abs(mean - sum(saved) / len(saved)) < 4 * error


def test_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = tiny_trainer(tmp_path, callbacks=[FutureGain()])
    with caplog.at_level("INFO"):
        trainer.validate(tiny_model(), TinyData([], batches(1)), verbose=False)
    assert "val/future_gain" not in scalars(trainer)
    line = "future gain: left out, it takes a second validation batch and tokens in its second half"
    assert caplog.messages.count(line) == 1


@pytest.mark.parametrize("options", [{"batches": 0}, {"tokens": 0}])
def test_mistakes(options: dict[str, int]) -> None:
    with pytest.raises(UserError, match=r"FutureGain: batches is \d, tokens \d+; both must be at least 1"):
        FutureGain(**options)
