"""The heads that attend exactly are those whose error adds most."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from muse_lightning.attention import AttentionStrategy, Dense, Muse
from muse_lightning.attention.partly_exact import ROUNDING
from muse_lightning.callbacks import AttentionError, ContextWarmup, ExactHeads, ExactTail
from muse_lightning.errors import UserError
from muse_lightning.measure.attention_error import errors_by_head
from tests.sharp_heads import (
    KV_HEADS,
    SHARP,
    SPREAD,
    ShortDocuments,
    Watch,
    checkpoint_of,
    heads_of,
    lines_of_heads,
    sharp_model,
)
from tests.tiny import SEQ_LEN, TinyData, batches, scalars, tiny_model, tiny_muse, tiny_trainer


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


def test_a_fit_that_has_no_choice_yet_makes_one_at_once(tmp_path: Path) -> None:
    path = checkpoint_of(sharp_model(), tmp_path, ExactHeads(4), steps=3)
    watch, model = Watch(), sharp_model(exact_heads=1)
    begins = heads_of(model)
    trainer = tiny_trainer(tmp_path / "rest", callbacks=[ExactHeads(10), watch], max_steps=6)
    trainer.fit(model, TinyData(batches(6)), ckpt_path=path)
    assert watch.heads[0] != begins
    assert watch.heads == [watch.heads[0]] * 3


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return lines_of_heads(monkeypatch)


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


def test_where_nothing_is_approximated_nothing_is_chosen(tmp_path: Path, lines: list[str]) -> None:
    """Documents of 12 tokens are one chunk: what differs is rounding. It looks again soon, and says what it found."""

    watch, model = Watch(), sharp_model()
    callbacks = [ShortDocuments(6), ExactHeads(20), watch]
    tiny_trainer(tmp_path, callbacks=callbacks, max_steps=6).fit(model, TinyData(batches(6)))
    spread, chosen = [(0,), (0,)], [(1,), (0,)]
    assert watch.heads == [spread] * 4 + [chosen] * 2
    assert lines == ["step 4: exact key-value heads by layer: 0: [1], 1: [0]"]


def test_rows_are_waited_for_until_they_are_whole(tmp_path: Path, lines: list[str]) -> None:
    watch, model = Watch(), sharp_model()
    callbacks = [ContextWarmup(steps=3, start=24), ExactHeads(2), watch]
    tiny_trainer(tmp_path, callbacks=callbacks, max_steps=6).fit(model, TinyData(batches(6)))
    assert watch.heads == [SPREAD] * 3 + [SHARP] * 3
    assert lines == ["step 3: exact key-value heads by layer: 0: [1], 1: [0]"]


def test_where_all_attend_exactly_while_rows_are_cut(tmp_path: Path, lines: list[str]) -> None:
    """Heads are chosen before the first step in which some are not exact."""
    watch, model = Watch(), sharp_model()
    callbacks = [ContextWarmup(steps=3, start=24, exact=True), ExactHeads(2), watch]
    trainer = tiny_trainer(tmp_path, callbacks=callbacks, max_steps=6, log_every_n_steps=1)
    trainer.fit(model, TinyData(batches(6)))
    assert watch.heads[3:] == [SHARP] * 3
    assert lines[-1] == "step 3: exact key-value heads by layer: 0: [1], 1: [0]"
    logged = scalars(trainer)
    for layer in range(2):
        counts = [value for _, value in logged[f"muse/exact_heads_layer_{layer}"]]
        assert counts == [KV_HEADS] * 3 + [1] * 3


def test_rows_that_were_whole_from_the_first_step_are_not_waited_for(tmp_path: Path) -> None:
    watch, model = Watch(), sharp_model()
    callbacks = [ContextWarmup(steps=3, start=SEQ_LEN), ExactHeads(2), watch]
    tiny_trainer(tmp_path, callbacks=callbacks, max_steps=2).fit(model, TinyData(batches(2)))
    assert watch.heads == [SHARP] * 2


def test_as_rows_become_whole_there_may_be_nothing_to_choose_by(tmp_path: Path, lines: list[str]) -> None:
    watch = Watch()
    callbacks = [ContextWarmup(steps=2, start=24), ShortDocuments(8), ExactHeads(20), watch]
    tiny_trainer(tmp_path, callbacks=callbacks, max_steps=8).fit(sharp_model(), TinyData(batches(8)))
    assert watch.heads == [SPREAD] * 4 + [SHARP] * 4
    assert lines == ["step 4: exact key-value heads by layer: 0: [1], 1: [0]"]


@pytest.mark.parametrize(
    "callbacks", [[], [ContextWarmup(steps=2, start=24)]], ids=["without the warm-up", "its end is earlier"]
)
def test_a_checkpoint_of_rows_that_were_cut_has_no_choice(
    tmp_path: Path, lines: list[str], callbacks: list[L.Callback]
) -> None:
    path = checkpoint_of(sharp_model(), tmp_path, ContextWarmup(steps=9, start=24), ExactHeads(), steps=3)
    lines.clear()
    watch = Watch()
    trainer = tiny_trainer(tmp_path / "rest", callbacks=[*callbacks, ExactHeads(), watch], max_steps=5)
    trainer.fit(sharp_model(), TinyData(batches(5)), ckpt_path=path)
    assert watch.heads == [SHARP] * 2
    assert lines == ["step 3: exact key-value heads by layer: 0: [1], 1: [0]"]


def test_it_goes_on_looking_when_it_would_have(tmp_path: Path) -> None:
    """A run that is resumed does not look at once."""
    watch, resumed = Watch(), Watch()
    saved = ModelCheckpoint(tmp_path, every_n_train_steps=3, save_top_k=-1)
    options = {"enable_checkpointing": True, "max_steps": 6}
    trainer = tiny_trainer(tmp_path / "whole", callbacks=[ShortDocuments(4), ExactHeads(40), watch, saved], **options)
    trainer.fit(sharp_model(), TinyData(batches(6)))
    trainer = tiny_trainer(tmp_path / "rest", callbacks=[ShortDocuments(4), ExactHeads(40), resumed], **options)
    trainer.fit(sharp_model(), TinyData(batches(6)), ckpt_path=tmp_path / "epoch=0-step=3.ckpt")
    assert watch.heads == [SPREAD] * 4 + [SHARP] * 2
    assert resumed.heads == watch.heads[3:]


def test_from_weights_of_exact_attention_it_looks_at_once(tmp_path: Path) -> None:
    path = checkpoint_of(sharp_model(exact_heads=0), tmp_path, ExactHeads(), steps=3)
    watch = Watch()
    trainer = tiny_trainer(tmp_path / "rest", callbacks=[ExactHeads(), watch], max_steps=5)
    trainer.fit(sharp_model(), TinyData(batches(5)), ckpt_path=path)
    assert watch.heads == [SHARP] * 2


def test_a_choice_is_kept_while_rows_are_cut(tmp_path: Path) -> None:
    path = checkpoint_of(sharp_model(), tmp_path, ExactHeads())
    watch = Watch()
    callbacks = [ContextWarmup(steps=3, start=24), ExactHeads(), watch]
    trainer = tiny_trainer(tmp_path / "rest", callbacks=callbacks, max_steps=3)
    trainer.fit(sharp_model(), TinyData(batches(3)), ckpt_path=path)
    assert watch.heads == [SHARP] * 2


def test_a_run_that_is_resumed_while_rows_are_cut_goes_on(tmp_path: Path) -> None:
    watch, resumed = Watch(), Watch()
    saved = ModelCheckpoint(tmp_path, every_n_train_steps=2, save_top_k=-1)
    options = {"enable_checkpointing": True, "max_steps": 6}
    trainer = tiny_trainer(tmp_path / "whole", callbacks=[ContextWarmup(4, 24), ExactHeads(5), watch, saved], **options)
    trainer.fit(sharp_model(), TinyData(batches(6)))
    trainer = tiny_trainer(tmp_path / "rest", callbacks=[ContextWarmup(4, 24), ExactHeads(5), resumed], **options)
    trainer.fit(sharp_model(), TinyData(batches(6)), ckpt_path=tmp_path / "epoch=0-step=2.ckpt")
    assert watch.heads == [SPREAD] * 4 + [SHARP] * 2
    assert resumed.heads == watch.heads[2:]


NOWHERE = (
    "model.exact_heads: no head was chosen; exact key-value heads by layer: {}; attention erred nowhere: rows "
    "(data.seq_len), documents and pieces of rows (ContextWarmup) of at most exact_below tokens are attended exactly"
)


def muse_below(layer: int) -> AttentionStrategy:
    """MuSe that approximates nothing at SEQ_LEN."""
    return Muse(layer, chunk=16, query_cluster=4, key_cluster=4, top_k=1, exact_below=SEQ_LEN)


@pytest.mark.parametrize(
    ("options", "callbacks", "is_said"),
    [
        ({}, [], True),
        ({}, [ExactTail(0.9)], False),  # exact in every layer
        ({"exact_heads": 4}, [], False),
        ({"exact_heads": 0}, [], False),
        ({"attention": tiny_muse}, [], False),  # there is a choice
    ],
)
def test_a_fit_that_never_chose_says_so(
    tmp_path: Path, lines: list[str], options: dict[str, Any], callbacks: list[L.Callback], is_said: bool
) -> None:
    model = sharp_model(**({"attention": muse_below} | options))
    tiny_trainer(tmp_path, callbacks=[ExactHeads(), *callbacks]).fit(model, TinyData(batches(4), batches(1)))
    assert (NOWHERE.format("0: [0], 1: [0]") in lines) == is_said
    assert sum("no head was chosen" in line for line in lines) == is_said


def test_a_fit_that_never_looked_says_so_and_nothing_of_errors(tmp_path: Path, lines: list[str]) -> None:
    callback = ExactHeads()
    model = sharp_model(attention=muse_below)
    tiny_trainer(tmp_path / "before", callbacks=[callback], max_steps=1).fit(model, TinyData(batches(1)))
    assert lines == [NOWHERE.format("0: [0], 1: [0]")]
    lines.clear()
    callbacks = [ContextWarmup(steps=9, start=24), callback]
    tiny_trainer(tmp_path / "rest", callbacks=callbacks, max_steps=6).fit(sharp_model(), TinyData(batches(6)))
    assert lines == [
        "model.exact_heads: no head was chosen; exact key-value heads by layer: 0: [0], 1: [0]; the first choice is "
        "made before step 9",
    ]


def test_a_fit_that_has_a_choice_does_not_say_that_it_has_none(tmp_path: Path, lines: list[str]) -> None:
    """The weights, or the last pieces, may be such that attention does not err any more."""
    model = sharp_model(attention=muse_below)
    model.choose_heads({0: [1], 1: [0]})
    tiny_trainer(tmp_path, callbacks=[ExactHeads()], max_steps=1).fit(model, TinyData(batches(1)))
    assert lines == []


def test_where_all_heads_are_exact_nothing_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("muse_lightning.callbacks.exact_heads.errors_by_head")
    trainer = tiny_trainer(tmp_path, callbacks=[ExactHeads()], max_steps=1)
    trainer.fit(sharp_model(exact_heads=4), TinyData(batches(1)))
    assert scalars(trainer)["muse/exact_heads_layer_1"] == [(0, 2.0)]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nothing_is_chosen_by_what_is_not_finite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: list[str], value: float
) -> None:
    errors = torch.tensor([[0.0, value], [0.0, 0.0]])
    monkeypatch.setattr("muse_lightning.callbacks.exact_heads.errors_by_head", lambda *_: errors)
    model = sharp_model()
    tiny_trainer(tmp_path, callbacks=[ExactHeads()], max_steps=1).fit(model, TinyData(batches(1)))
    assert heads_of(model) == [(0,), (0,)]
    assert not model.are_heads_chosen
    assert lines == [
        "model.exact_heads: no head was chosen; exact key-value heads by layer: 0: [0], 1: [0]; errors are not finite"
    ]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_error_that_is_not_finite_stays_so(value: float) -> None:
    model = sharp_model()
    model.llama.blocks[1].self_attn.v_proj.weight.data.fill_(value)
    first, second = errors_by_head(model.llama, batches(1)[0]["input_ids"])
    assert first.isfinite().all()
    assert second.isnan().all()


def test_what_counts_as_rounding_is_shared_by_heads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for error, heads in ((0.6 * ROUNDING, [(1,), (0,)]), (0.4 * ROUNDING, [(0,), (0,)])):
        errors = torch.tensor([[0.0, error], [error, 0.0]])
        monkeypatch.setattr("muse_lightning.callbacks.exact_heads.errors_by_head", lambda *_, errors=errors: errors)
        model = sharp_model()
        tiny_trainer(tmp_path, callbacks=[ExactHeads()], max_steps=1).fit(model, TinyData(batches(1)))
        assert heads_of(model) == heads


def test_mistakes() -> None:
    with pytest.raises(UserError, match="ExactHeads: every_n_steps is 0; accepted: at least 1"):
        ExactHeads(every_n_steps=0)
