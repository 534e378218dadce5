"""The gain of a model that looks ahead, of one that cannot, and against a loop over texts that end."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor

from muse_lightning.callbacks import FutureGain
from muse_lightning.callbacks.future_gain import _number_over_ranks
from muse_lightning.errors import UserError
from muse_lightning.training.totals import Totals
from tests.tiny import SEQ_LEN, VOCAB, TinyData, batches, scalars, tiny_model, tiny_muse, tiny_trainer

PEEK = 5.0


def gain(folder: Path, model: object, val: list[dict[str, Tensor]], callback: FutureGain) -> list[float]:
    trainer = tiny_trainer(folder, callbacks=[callback])
    trainer.validate(model, TinyData([], val), verbose=False)
    found = scalars(trainer)
    return [found[tag][0][1] for tag in ("val/future_gain", "val/future_gain_error")]


class Peeking(torch.nn.Module):
    """In place of a Llama: the logit of whatever token stands next in its document is PEEK, others' are 0."""

    def __init__(self) -> None:
        super().__init__()
        self.lm_head = torch.nn.Linear(VOCAB, VOCAB, bias=False)
        torch.nn.init.eye_(self.lm_head.weight)
        self.calls = 0

    def hidden_states(self, input_ids: Tensor, *, cu_seqlens: Tensor | None = None) -> Tensor:
        self.calls += 1
        logits = PEEK * torch.nn.functional.one_hot(input_ids.flatten().roll(-1), VOCAB).float()
        if cu_seqlens is not None:
            logits[cu_seqlens.long() - 1] = 0.0
        return logits.view(*input_ids.shape, VOCAB)


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "whole-rows"])
def test_a_model_that_peeks(tmp_path: Path, packed: bool) -> None:
    model, val = tiny_model(exact_val_batches=0, seq_len=None), batches(3, packed=packed)
    model.llama = peeking = Peeking()
    for batch in val:
        batch["labels"][:, -1] = -100  # no token stands behind it
    mean, error = gain(tmp_path, model, val, FutureGain(batches=2, tokens=5))
    assert peeking.calls == len(val) + 2 * (5 + 1)
    known = torch.zeros(VOCAB)
    known[0] = PEEK
    assert mean == pytest.approx(torch.tensor(VOCAB).log().item() + known.log_softmax(0)[0].item())
    assert error == pytest.approx(0.0, abs=1e-3)


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "whole-rows"])
def test_exact_attention_gains_nothing(tmp_path: Path, packed: bool) -> None:
    model = tiny_model(config={"initializer_range": 0.5}, exact_val_batches=0)
    mean, error = gain(tmp_path, model, batches(3, packed=packed), FutureGain())
    assert abs(mean) < 1e-6
    assert error < 1e-6


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "whole-rows"])
def test_muse_against_a_loop(tmp_path: Path, packed: bool) -> None:
    """All tokens of the second half, each at the end of a text of its own; more than all are not sampled."""
    # So large that attention selects.
    model = tiny_model(config={"initializer_range": 0.5}, attention=tiny_muse, exact_val_batches=0)
    val = batches(3, packed=packed)
    mean, error = gain(tmp_path, model, val, FutureGain(batches=2, tokens=50))
    saved = []
    for batch in val[:2]:
        ends = batch.get("cu_seqlens", torch.tensor([0, SEQ_LEN, 2 * SEQ_LEN])).tolist()
        tokens, labels = batch["input_ids"].flatten(), batch["labels"].flatten()
        for index in range(2 * SEQ_LEN):
            if index % SEQ_LEN >= SEQ_LEN // 2 and labels[index] != -100:
                start = max(each for each in ends if each <= index)
                end = min(each for each in ends if each > index)
                with torch.no_grad():
                    whole, alone = (
                        model.llama(tokens[None, start:stop]).log_softmax(-1)[0, index - start, labels[index]]
                        for stop in (end, index + 1)
                    )
                saved.append((whole - alone).item())
    assert max(map(abs, saved)) > 1e-3
    # Packed, a row has a label or two more than the other of its batch, which are left out.
    assert mean == pytest.approx(sum(saved) / len(saved), abs=error if packed else 1e-6)
    assert error == pytest.approx(torch.tensor(saved).std().item() / len(saved) ** 0.5, rel=0.2 if packed else 1e-3)


def test_tokens_that_ranks_share_count_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks with the same rows have twice the sums of one, and know no more."""
    model = tiny_model(config={"initializer_range": 0.5}, attention=tiny_muse, exact_val_batches=0)
    val = batches(1)
    alone = gain(tmp_path / "alone", model, val, FutureGain())
    monkeypatch.setattr(SingleDeviceStrategy, "reduce", lambda _, sums, **__: 2 * sums)
    monkeypatch.setattr(TinyData, "ranks_per_block", 2, raising=False)
    assert gain(tmp_path / "shared", model, val, FutureGain()) == alone


@pytest.mark.parametrize(
    ("ranks", "sharing", "numbers"),
    [(1, 1, [[0], [1]]), (2, 1, [[0, 1], [2, 3]]), (4, 2, [[0, 0, 1, 1], [2, 2, 3, 3]])],
)
def test_batches_are_numbered_over_ranks(ranks: int, sharing: int, numbers: list[list[int]]) -> None:
    def number(rank: int, batch_idx: int) -> int:
        data = SimpleNamespace(ranks_per_block=sharing)
        return _number_over_ranks(SimpleNamespace(world_size=ranks, global_rank=rank, datamodule=data), batch_idx)

    assert [[number(rank, batch_idx) for rank in range(ranks)] for batch_idx in range(2)] == numbers


def test_no_float64(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Apple's GPUs have none; the totals know of it."""
    dtypes, add = set(), Totals.add

    def remember(totals: Totals, *values: Tensor) -> None:
        dtypes.update(value.dtype for value in values)
        add(totals, *values)

    monkeypatch.setattr(Totals, "add", remember)
    gain(tmp_path, tiny_model(exact_val_batches=0), batches(1), FutureGain(tokens=2))
    assert dtypes - {torch.int64} == {torch.float32}


@pytest.mark.parametrize("labels", [0, 1])
def test_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture, labels: int) -> None:
    [batch] = batches(1)
    batch["labels"][:, SEQ_LEN // 2 :] = -100
    batch["labels"][0, SEQ_LEN - 1 : SEQ_LEN - 1 + labels] = 1
    trainer = tiny_trainer(tmp_path, callbacks=[FutureGain(tokens=1)])
    with caplog.at_level("INFO"):
        trainer.validate(tiny_model(), TinyData([], [batch]), verbose=False)
    assert "val/future_gain" not in scalars(trainer)
    line = "future gain: left out, fewer than two tokens were sampled in the second halves of rows"
    assert caplog.messages.count(line) == 1


@pytest.mark.parametrize("options", [{"batches": 0}, {"tokens": 0}])
def test_mistakes(options: dict[str, int]) -> None:
    with pytest.raises(UserError, match=r"FutureGain: batches is \d, tokens \d+; both must be at least 1"):
        FutureGain(**options)
