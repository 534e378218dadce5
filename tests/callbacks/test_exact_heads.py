"""The heads that attend exactly are those whose error adds most."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from muse_lightning.attention import Dense
from muse_lightning.callbacks import AttentionError, ContextWarmup, ExactHeads, ExactTail
from muse_lightning.errors import NumericsError, UserError
from muse_lightning.measure.attention_error import errors_by_head
from muse_lightning.numerics.failed_step import KEY
from muse_lightning.numerics.guard import NumericsGuard
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
        merge = model.llama.blocks[layer].self_attn.merge
        for head in range(KV_HEADS):
            wrong = torch.zeros_like(exact)
            those = slice(2 * head, 2 * head + 2)
            wrong[:, those] = muse[:, those] - exact[:, those]
            wanted = merge(wrong).square().sum() / merge(exact).square().sum()
            torch.testing.assert_close(found[layer, head], wanted)
    assert found.flatten().argsort(descending=True)[:2].sort().values.tolist() == [1, 2]


def test_an_error_counts_by_what_it_adds() -> None:
    model = sharp_model()
    weight = model.llama.blocks[0].self_attn.o_proj.weight
    halves = weight.data.chunk(KV_HEADS, 1)
    [batch] = batches(1)
    before = errors_by_head(model.llama, batch["input_ids"])[0]
    halves[1].mul_(1e-3)  # the head that errs most
    after = errors_by_head(model.llama, batch["input_ids"])[0]
    assert before[1] > 10 * before[0]
    assert after[1] < after[0]


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
    counts = [[value for _, value in scalars(trainer)[f"muse/exact_heads_layer_{layer}"]] for layer in range(2)]
    assert [sum(each) for each in zip(*counts, strict=True)] == [1.0, 4.0]
    assert all(isinstance(block.self_attn.attention, Dense) for block in model.llama.blocks)
    trainer = tiny_trainer(tmp_path / "none", callbacks=[ExactHeads()], max_steps=1)
    trainer.fit(tiny_model(attention=tiny_muse), TinyData(batches(1), batches(1)))
    assert not any("exact_heads" in tag for tag in scalars(trainer))


def checkpoint_of(model: LanguageModel, folder: Path, *callbacks: L.Callback, steps: int = 1) -> Path:
    trainer = tiny_trainer(folder, callbacks=list(callbacks), max_steps=steps)
    trainer.fit(model, TinyData(batches(6)))
    trainer.save_checkpoint(folder / "a.ckpt")
    return folder / "a.ckpt"


def validated(model: LanguageModel, folder: Path, ckpt_path: Path | None = None) -> list[tuple[int, ...]]:
    """The heads that a validation had."""
    tiny_trainer(folder).validate(model, TinyData([], batches(1)), ckpt_path=ckpt_path, verbose=False)
    return heads_of(model)


def test_a_choice_is_of_its_layers(tmp_path: Path) -> None:
    model = tiny_model(attention=tiny_muse, exact_layers=(0,), exact_heads=1)
    model.choose_heads({1: [1]})
    path = checkpoint_of(model, tmp_path)
    for exact_layers, heads in (((0,), [(1,)]), ((1,), [(0,)])):
        other = tiny_model(attention=tiny_muse, exact_layers=exact_layers, exact_heads=1)
        assert validated(other, tmp_path / str(exact_layers), path) == heads
    model = tiny_model(attention=tiny_muse, exact_heads=1, config={"num_hidden_layers": 2})
    assert validated(model, tmp_path / "none", path) == [(0,), ()]


def test_a_fit_that_has_no_choice_yet_makes_one_at_once(tmp_path: Path) -> None:
    path = checkpoint_of(sharp_model(), tmp_path, ExactHeads(4), steps=3)
    watch, model = Watch(), sharp_model(exact_heads=1)
    begins = heads_of(model)
    trainer = tiny_trainer(tmp_path / "rest", callbacks=[ExactHeads(10), watch], max_steps=6)
    trainer.fit(model, TinyData(batches(6)), ckpt_path=path)
    assert watch.heads[0] != begins
    assert watch.heads == [watch.heads[0]] * 3


def test_a_checkpoint_of_the_tail_has_the_choice_before_it(tmp_path: Path) -> None:
    path = checkpoint_of(sharp_model(), tmp_path, ExactHeads(), ExactTail(0.5), steps=2)
    assert validated(tiny_model(attention=tiny_muse, exact_heads=2), tmp_path / "b", path) == [(1,), (0,)]


def test_an_evaluation_without_a_choice_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr("muse_lightning.training.module.rank_zero_info", lines.append)
    path = checkpoint_of(sharp_model(), tmp_path, ExactHeads())
    said = "model.exact_heads: 2 heads are exact, evenly spread; "
    for weights, ckpt_path, is_said in ((path, None, True), (None, path, False)):
        lines.clear()
        model = tiny_model(attention=tiny_muse, exact_heads=2, weights=weights)
        validated(model, tmp_path / str(is_said), ckpt_path)
        assert any(line.startswith(said) for line in lines) == is_said


@pytest.mark.parametrize(
    ("options", "is_said"),
    [
        ({"exact_heads": 2}, False),
        ({"exact_heads": 0}, True),
        ({"exact_heads": 1, "exact_layers": (0,)}, True),
        ({"attention": Dense}, False),
    ],
)
def test_an_evaluation_by_others_than_the_checkpoints_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], is_said: bool
) -> None:
    lines: list[str] = []
    monkeypatch.setattr("muse_lightning.training.module.rank_zero_info", lines.append)
    path = checkpoint_of(sharp_model(), tmp_path, ExactHeads())
    validated(tiny_model(**({"attention": tiny_muse} | options)), tmp_path / "other", path)
    said = (
        f"checkpoint {path}: 2 exact heads of its training are not used; they are for model.exact_heads=2 and its "
        "model.exact_layers"
    )
    assert (said in lines) == is_said


def test_another_training_chooses_anew(tmp_path: Path) -> None:
    callback = ExactHeads(2)
    for number in range(2):
        model = sharp_model()
        tiny_trainer(tmp_path / str(number), callbacks=[callback], max_steps=1).fit(model, TinyData(batches(1)))
        assert heads_of(model) == [(1,), (0,)]


def test_exact_attention_has_no_heads_beside_it(tmp_path: Path) -> None:
    model = tiny_model(exact_heads=2)
    trainer = tiny_trainer(tmp_path, callbacks=[ExactHeads(), AttentionError()], max_steps=1)
    trainer.fit(model, TinyData(batches(1), batches(1)))
    assert model.partly_exact == []
    assert not [tag for tag in scalars(trainer) if tag.startswith("muse/")]


def test_where_nothing_is_approximated_nothing_is_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of 12 tokens are one chunk: what differs is rounding. It looks again soon, and says what it has found."""
    lines: list[str] = []
    monkeypatch.setattr("muse_lightning.callbacks.exact_heads.rank_zero_info", lines.append)
    watch, model = Watch(), sharp_model()
    callbacks = [ContextWarmup(steps=6, start=12), ExactHeads(20), watch]
    tiny_trainer(tmp_path, callbacks=callbacks, max_steps=6).fit(model, TinyData(batches(6)))
    spread, chosen = [(0,), (0,)], [(1,), (0,)]
    assert watch.heads == [spread] * 4 + [chosen] * 2
    assert lines == ["step 4: exact key-value heads by layer: 0: [1], 1: [0]"]


def test_a_checkpoint_without_a_choice_has_none(tmp_path: Path) -> None:
    path = checkpoint_of(tiny_model(attention=tiny_muse, exact_heads=2), tmp_path)
    assert torch.load(path, weights_only=True)["exact_heads"] == {}
    model = tiny_model(attention=tiny_muse, exact_heads=2)
    assert validated(model, tmp_path / "b", path) == [(0,), (0,)]
    assert not model.are_heads_chosen


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nothing_is_chosen_by_what_is_not_finite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float) -> None:
    errors = torch.tensor([[0.0, value], [0.0, 0.0]])
    monkeypatch.setattr("muse_lightning.callbacks.exact_heads.errors_by_head", lambda *_: errors)
    model = sharp_model()
    tiny_trainer(tmp_path, callbacks=[ExactHeads()], max_steps=1).fit(model, TinyData(batches(1)))
    assert heads_of(model) == [(0,), (0,)]
    assert not model.are_heads_chosen


def test_a_step_to_replay_has_its_own_heads(tmp_path: Path) -> None:
    """And not those that were chosen while losses were bad already."""
    watch, model = Watch(), sharp_model()

    class Bad(L.Callback):
        def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
            if trainer.global_step >= 3:
                loss.data.fill_(float("nan"))

        def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
            if trainer.global_step == 4:  # as another batch may have it
                pl_module.choose_heads({0: [0], 1: [1]})

    guard = NumericsGuard(stop_after=2, dirpath=tmp_path / "numerics")
    trainer = tiny_trainer(tmp_path, callbacks=[ExactHeads(100), Bad(), guard, watch], max_steps=8)
    with pytest.raises(NumericsError, match="step 4 is saved"):
        trainer.fit(model, TinyData(batches(8)))
    [file] = (tmp_path / "numerics").glob("*.ckpt")
    assert torch.load(file, weights_only=True)[KEY]["exact_heads"] == {0: [1], 1: [0]}


def test_every_n_steps_is_at_least_one() -> None:
    with pytest.raises(UserError, match="ExactHeads: every_n_steps is 0; accepted: at least 1"):
        ExactHeads(0)
