"""The heads that attend exactly are those on which the approximation errs most."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from muse_lightning.attention import Dense
from muse_lightning.callbacks import AttentionError, ExactHeads, ExactTail
from muse_lightning.errors import UserError
from muse_lightning.measure.attention_error import errors_by_head, relative_squared_error
from muse_lightning.training.module import LanguageModel
from tests.tiny import TinyData, batches, scalars, tiny_model, tiny_muse, tiny_trainer

KV_HEADS = 2


def heads_of(model: LanguageModel) -> list[tuple[int, ...]]:
    return [strategy.heads for strategy in model.partly_exact]


def sharp_model(**options: Any) -> LanguageModel:
    """Its first layer's second key-value head and its second layer's first look for single tokens; the others attend to
    everything alike, as fresh weights do, where an approximation loses nothing."""
    model = tiny_model(attention=tiny_muse, **({"exact_heads": 2, "learning_rate": 1e-9} | options))
    torch.manual_seed(0)
    model.configure_model()
    for block, sharp in zip(model.llama.blocks, (1, 0), strict=True):
        weight = block.self_attn.q_proj.weight.data.unflatten(0, (KV_HEADS, -1))
        weight[sharp] *= 3000
    return model


class Watch(L.Callback):
    """What each step had."""

    def __init__(self) -> None:
        self.heads: list[list[tuple[int, ...]]] = []

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        assert isinstance(pl_module, LanguageModel)
        self.heads.append(heads_of(pl_module))


def test_errors_by_head_are_those_of_the_other_strategy() -> None:
    model = sharp_model()
    [batch] = batches(1)
    found = errors_by_head(model.llama, batch["input_ids"], batch["cu_seqlens"])
    assert found.shape == (2, KV_HEADS)
    outs: list[tuple[Tensor, Tensor]] = []

    def both(strategy: Any, inputs: tuple[Tensor, ...], options: dict[str, Any]) -> None:
        outs.append((tiny_muse(0)(*inputs, **options), Dense(0)(*inputs, **options)))

    for strategy in model.partly_exact:
        strategy.register_forward_pre_hook(both, with_kwargs=True)
    model.llama.hidden_states(batch["input_ids"], cu_seqlens=batch["cu_seqlens"])
    for layer, (muse, exact) in enumerate(outs):
        for head in range(KV_HEADS):
            those = slice(2 * head, 2 * head + 2)
            wanted = relative_squared_error(muse[:, those], exact[:, those])
            torch.testing.assert_close(found[layer, head], wanted)
    assert found.flatten().argsort(descending=True)[:2].sort().values.tolist() == [1, 2]


def test_no_error_of_outputs_that_are_nothing() -> None:
    model = sharp_model()
    for block in model.llama.blocks:
        block.self_attn.v_proj.weight.data.zero_()
    [batch] = batches(1)
    assert errors_by_head(model.llama, batch["input_ids"]).tolist() == [[0.0] * KV_HEADS] * 2


@pytest.mark.parametrize("accumulate", [1, 2])
def test_it_chooses_before_the_first_step_and_every_so_many(tmp_path: Path, accumulate: int) -> None:
    watch, model = Watch(), sharp_model()
    calls: list[int] = []

    class Counted(ExactHeads):
        def on_train_batch_start(self, trainer: L.Trainer, *rest: Any) -> None:
            before = self._last_step
            super().on_train_batch_start(trainer, *rest)
            calls.extend([trainer.global_step] if self._last_step != before else [])

    trainer = tiny_trainer(
        tmp_path, callbacks=[Counted(every_n_steps=2), watch], max_steps=5, accumulate_grad_batches=accumulate
    )
    assert heads_of(model) == [(0,), (0,)]
    trainer.fit(model, TinyData(batches(5 * accumulate), batches(1)))
    assert calls == [0, 2, 4]
    assert watch.heads == [[(1,), (0,)]] * 5 * accumulate
    logged = scalars(trainer)
    for layer in range(2):
        assert [value for _, value in logged[f"muse/exact_heads_layer_{layer}"]] == [1.0] * 5


def test_the_error_that_is_left_is_smaller(tmp_path: Path) -> None:
    errors = []
    for every in (1, 10**9):
        model = sharp_model()
        trainer = tiny_trainer(tmp_path / str(every), callbacks=[ExactHeads(every), AttentionError()], max_steps=1)
        if every > 1:
            trainer.callbacks = [each for each in trainer.callbacks if not isinstance(each, ExactHeads)]
        trainer.fit(model, TinyData(batches(1), batches(1)))
        errors.append(scalars(trainer)["muse/relative_error"][-1][1])
    assert errors[0] < errors[1] / 3


@pytest.mark.parametrize(("precision", "dtype"), [("32-true", torch.float32), ("bf16-mixed", torch.bfloat16)])
def test_it_measures_in_the_precision_of_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str, dtype: torch.dtype
) -> None:
    seen: list[torch.dtype] = []

    def watched(model: Any, *inputs: Any) -> Tensor:
        for block in model.blocks:
            block.self_attn.attention.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))
        return errors_by_head(model, *inputs)

    monkeypatch.setattr("muse_lightning.callbacks.exact_heads.errors_by_head", watched)
    trainer = tiny_trainer(tmp_path, callbacks=[ExactHeads()], precision=precision, max_steps=1)
    trainer.fit(sharp_model(), TinyData(batches(1), batches(1)))
    assert seen[:2] == [dtype] * 2


def test_a_resumed_run_goes_on_with_its_heads(tmp_path: Path) -> None:
    watch, resumed = Watch(), Watch()
    saved = ModelCheckpoint(tmp_path, every_n_train_steps=3, save_top_k=-1)
    models = [sharp_model(learning_rate=1e-2) for _ in range(2)]
    options = {"enable_checkpointing": True, "max_steps": 6}
    trainer = tiny_trainer(tmp_path / "whole", callbacks=[ExactHeads(4), watch, saved], **options)
    trainer.fit(models[0], TinyData(batches(6)))
    trainer = tiny_trainer(tmp_path / "rest", callbacks=[ExactHeads(4), resumed], **options)
    trainer.fit(models[1], TinyData(batches(6)), ckpt_path=tmp_path / "epoch=0-step=3.ckpt")
    assert watch.heads[3] != heads_of(tiny_model(attention=tiny_muse, exact_heads=2))
    assert resumed.heads == watch.heads[3:]
    for whole, rest in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(whole, rest)


def test_an_evaluation_has_the_heads_of_the_checkpoint(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, callbacks=[ExactHeads()], max_steps=1)
    trainer.fit(sharp_model(), TinyData(batches(1), batches(1)))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    evaluated = tiny_model(attention=tiny_muse, exact_heads=2)
    tiny_trainer(tmp_path / "b").validate(
        evaluated, TinyData([], batches(1)), ckpt_path=tmp_path / "a.ckpt", verbose=False
    )
    assert heads_of(evaluated) == [(1,), (0,)]
    other = tiny_model(attention=tiny_muse, exact_heads=3)
    tiny_trainer(tmp_path / "c").validate(other, TinyData([], batches(1)), ckpt_path=tmp_path / "a.ckpt", verbose=False)
    assert heads_of(other) == [(0, 1), (0,)]  # as a model begins that has three


def test_it_does_nothing_without_exact_heads(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, callbacks=[ExactHeads(), ExactTail(0.5)], max_steps=2)
    model = tiny_model(attention=tiny_muse, exact_heads=1)
    trainer.fit(model, TinyData(batches(2), batches(1)))  # in the tail all are exact, and none is chosen
    assert model.partly_exact == []
    trainer = tiny_trainer(tmp_path / "none", callbacks=[ExactHeads()], max_steps=1)
    trainer.fit(tiny_model(attention=tiny_muse), TinyData(batches(1), batches(1)))
    assert not any("exact_heads" in tag for tag in scalars(trainer))


def test_every_n_steps_is_at_least_one() -> None:
    with pytest.raises(UserError, match="ExactHeads: every_n_steps is 0; accepted: at least 1"):
        ExactHeads(0)
