"""Which pieces a step is trained on, and that it is a training on such pieces."""

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch

from muse_lightning.attention import Dense, SlidingWindow
from muse_lightning.callbacks import ContextWarmup, ExactHeads, ExactTail, StopAfter
from muse_lightning.data.batches import cut_documents, document_lengths
from muse_lightning.errors import UserError
from tests.sharp_heads import SPREAD, heads_of, sharp_model
from tests.tiny import SEQ_LEN, TinyData, batches, scalars, tiny_model, tiny_muse, tiny_trainer


class Watch(L.Callback):
    """The longest document of each micro-batch, by its optimizer step; and the steps, the validations by the steps
    before them, and the ends of micro-batches by their step, in which every layer attended exactly."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, int]] = []
        self.exact_steps: list[int] = []
        self.exact_validations: list[int] = []
        self.exact_at_end: list[int] = []

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
        self.exact_steps += [trainer.global_step] * pl_module.attends_exactly

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.exact_validations += [trainer.global_step] * pl_module.attends_exactly

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: dict[str, Any], batch_idx: int
    ) -> None:
        longest = max(document_lengths(*batch["input_ids"].shape, batch.get("cu_seqlens")))
        self.seen.append((batch_idx // 2, longest))
        self.exact_at_end += [batch_idx // 2] * pl_module.attends_exactly  # what is logged there counts


def fit(
    folder: Path,
    warmup: list[L.Callback],
    data: list[Any],
    *,
    model: dict[str, Any] | None = None,
    ckpt_path: Path | None = None,
    **options: Any,
) -> tuple[Watch, Any, L.Trainer]:
    torch.manual_seed(0)
    watch, module = Watch(), tiny_model(**({"attention": tiny_muse} | (model or {})))
    trainer = tiny_trainer(
        folder, callbacks=[*warmup, watch], accumulate_grad_batches=2, **({"max_steps": 8} | options)
    )
    datamodule = TinyData(data, batches(1, packed=False))
    trainer.fit(module, datamodule=datamodule, ckpt_path=ckpt_path, weights_only=True)
    return watch, module, trainer


@pytest.mark.parametrize(
    ("steps", "start", "lengths"),
    [
        (6, 12, [12, 12, 12, 24, 24, 24, 48, 48]),
        (4, 6, [6, 6, 12, 24, 48, 48, 48, 48]),
        (3, 10, [10, 20, 40, 48, 48, 48, 48, 48]),
        (1, 47, [47, 48, 48, 48, 48, 48, 48, 48]),
        # Few steps: 192 documents in each.
        (100, 1, [1] * 2),
    ],
)
def test_pieces_double_until_rows_are_whole(tmp_path: Path, steps: int, start: int, lengths: list[int]) -> None:
    warmup = ContextWarmup(steps, start)
    data = batches(2 * len(lengths) + 2, packed=False)
    watch, _, trainer = fit(tmp_path, [warmup], data, max_steps=len(lengths), log_every_n_steps=1)
    assert watch.seen == [(step, length) for step, length in enumerate(lengths) for _ in range(2)]
    assert [value for _, value in scalars(trainer)["train/context"]] == lengths
    assert warmup.whole_from(SEQ_LEN) == steps
    assert warmup.length(steps - 1, SEQ_LEN) < SEQ_LEN == warmup.length(steps, SEQ_LEN) == warmup.length(10**9, SEQ_LEN)


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "whole-rows"])
def test_it_is_a_training_on_the_pieces(tmp_path: Path, packed: bool) -> None:
    """The same weights, bit for bit, as from batches that came cut; and others than from whole rows."""
    items = batches(16, packed=packed)
    cut = [{**item, "cu_seqlens": cut_documents(item, 12 if i < 8 else 24)} for i, item in enumerate(items)]
    models = [
        fit(tmp_path / name, warmup, data)[1]
        for name, warmup, data in (
            ("warmup", [ContextWarmup(8, 12)], items),
            ("cut", [], cut),
            ("whole", [], items),
        )
    ]
    found, wanted, whole = map(weights, models)
    assert torch.equal(found, wanted)
    assert not torch.equal(found, whole)


def test_a_resumed_run_goes_on(tmp_path: Path) -> None:
    _, _, trainer = fit(tmp_path / "first", [ContextWarmup(8, 12)], batches(10, packed=False), max_steps=5)
    path = tmp_path / "step=5.ckpt"
    trainer.save_checkpoint(path)
    data = batches(40, packed=False)
    watch, _, _ = fit(tmp_path / "second", [ContextWarmup(8, 12)], data, max_steps=9, ckpt_path=path)
    assert [length for _, length in watch.seen] == [24] * 6 + [48] * 2


def weights(model: Any) -> torch.Tensor:
    return torch.cat([parameter.flatten() for parameter in model.parameters()])


def test_exact_until_rows_are_whole(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Until then the same weights, bit for bit, as with exact attention; then the recipe's attention again."""
    caplog.set_level("INFO", "lightning.pytorch.utilities.rank_zero")
    data, every_step = batches(16, packed=False), {"val_check_interval": 2, "check_val_every_n_epoch": None}
    warmup = ContextWarmup(4, 12, exact=True)
    for name, steps, are_equal in (("cut", 4, True), ("whole", 5, False)):
        watch, model, _ = fit(tmp_path / name, [warmup], data, max_steps=steps, **every_step)
        plain = ContextWarmup(4, 12)
        _, dense, _ = fit(tmp_path / f"{name}-dense", [plain], data, max_steps=steps, model={"attention": Dense})
        assert torch.equal(weights(model), weights(dense)) == are_equal
        line = "step 4: rows are whole, and attended to as the recipe says from here on"
        assert caplog.messages.count(line) == (name == "whole")
        assert watch.exact_steps == [0, 1, 2, 3]
        assert watch.exact_validations == [1, 2, 3, 4]
        assert watch.exact_at_end == [step for step in range(4) for _ in range(2)]
        assert [type(block.self_attn.attention).__name__ for block in model.llama.blocks] == ["Muse"] * 2


def test_exact_is_what_the_architecture_means(tmp_path: Path) -> None:
    """The same weights as with its window in every layer."""
    data, window = batches(8, packed=False), {"config": {"sliding_window": 20}}
    _, model, _ = fit(tmp_path / "muse", [ContextWarmup(4, 24, exact=True)], data, max_steps=4, model=window)
    exact = window | {"attention": partial(SlidingWindow, window=20)}
    _, other, _ = fit(tmp_path / "window", [ContextWarmup(4, 24)], data, max_steps=4, model=exact)
    _, dense, _ = fit(tmp_path / "dense", [ContextWarmup(4, 24)], data, max_steps=4, model={"attention": Dense})
    assert torch.equal(weights(model), weights(other))
    assert not torch.equal(weights(model), weights(dense))


def test_where_attention_is_exact_anyway_nothing_is_switched(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Strategies(L.Callback):
        def __init__(self) -> None:
            self.seen: set[Any] = set()

        def on_before_backward(self, trainer: L.Trainer, pl_module: Any, loss: torch.Tensor) -> None:
            self.seen |= {block.self_attn.attention for block in pl_module.llama.blocks}

    callbacks, data = [ContextWarmup(4, 12, exact=True), strategies := Strategies()], batches(12, packed=False)
    with caplog.at_level("INFO", "lightning.pytorch.utilities.rank_zero"):
        fit(tmp_path, callbacks, data, max_steps=6, model={"attention": Dense})
    assert len(strategies.seen) == 2
    assert not any("rows are whole, and attended" in message for message in caplog.messages)


def fit_with_heads(
    folder: Path, callbacks: list[L.Callback], ckpt_path: Path | None = None, **options: Any
) -> tuple[Any, L.Trainer]:
    """Eight steps of a model in which heads err, so that there is something to choose by."""
    model = sharp_model(**({"learning_rate": 1e-2} | options))
    trainer = tiny_trainer(folder, callbacks=callbacks, max_steps=8, accumulate_grad_batches=2)
    trainer.fit(model, TinyData(batches(16, packed=False)), ckpt_path=ckpt_path, weights_only=True)
    return model, trainer


def test_it_is_exact_attention_that_goes_on_with_another(tmp_path: Path) -> None:
    """One training has the same weights, bit for bit, as two: with exact attention until rows are whole, and on from
    its checkpoint with the recipe's and heads that are chosen there."""
    one, _ = fit_with_heads(tmp_path / "one", [ContextWarmup(4, 12, exact=True), ExactHeads(2)])
    exact = {"attention": Dense, "exact_heads": 0}
    _, trainer = fit_with_heads(tmp_path / "first", [ContextWarmup(4, 12), StopAfter(4)], **exact)
    trainer.save_checkpoint(path := tmp_path / "step=4.ckpt")
    two, _ = fit_with_heads(tmp_path / "second", [ContextWarmup(4, 12), ExactHeads(2)], path)
    assert one.are_heads_chosen
    assert heads_of(one) == heads_of(two) != SPREAD
    assert torch.equal(weights(one), weights(two))
    dense, _ = fit_with_heads(tmp_path / "dense", [ContextWarmup(4, 12)], path, **exact)
    assert not torch.equal(weights(two), weights(dense))


@pytest.mark.parametrize("stop", [3, 4, 5], ids=["before", "where rows become whole", "behind"])
def test_a_resumed_training_is_the_uninterrupted_one(tmp_path: Path, stop: int) -> None:
    def callbacks() -> list[L.Callback]:
        return [ContextWarmup(4, 12, exact=True), ExactHeads(2)]

    whole, _ = fit_with_heads(tmp_path / "whole", callbacks())
    _, trainer = fit_with_heads(tmp_path / "first", [*callbacks(), StopAfter(stop)])
    trainer.save_checkpoint(path := tmp_path / f"step={stop}.ckpt")
    watch = Watch()
    resumed, _ = fit_with_heads(tmp_path / "rest", [*callbacks(), watch], path)
    assert watch.exact_steps == [*range(stop, 4)]
    assert resumed.are_heads_chosen
    assert torch.equal(weights(resumed), weights(whole))


def test_the_recipes_attention_is_back_after_a_training_that_ends_before(tmp_path: Path) -> None:
    warmup = ContextWarmup(8, 12, exact=True)
    watch, model, trainer = fit(tmp_path, [warmup], batches(4, packed=False), max_steps=2)
    assert watch.exact_steps == [0, 1]
    assert not model.attends_exactly
    trainer.save_checkpoint(tmp_path / "step=2.ckpt")
    data = batches(40, packed=False)
    watch, _, _ = fit(tmp_path / "on", [warmup], data, max_steps=10, ckpt_path=tmp_path / "step=2.ckpt")
    assert watch.exact_steps == [2, 3, 4, 5, 6, 7]


def test_the_recipes_attention_is_back_after_an_exception(tmp_path: Path) -> None:
    class Interrupted(L.Callback):
        def on_before_optimizer_step(self, trainer: L.Trainer, *_: Any) -> None:
            if trainer.global_step == 1:
                raise FileNotFoundError

    model, data = tiny_model(attention=tiny_muse), TinyData(batches(4, packed=False))
    trainer = tiny_trainer(tmp_path, callbacks=[ContextWarmup(8, 12, exact=True), Interrupted()])
    with pytest.raises(FileNotFoundError):
        trainer.fit(model, data)
    assert not model.attends_exactly


def test_with_an_exact_tail_that_begins_before(tmp_path: Path) -> None:
    both = [ContextWarmup(4, 12, exact=True), ExactTail(0.75)]
    watch, _, _ = fit(tmp_path, both, batches(16, packed=False))
    assert watch.exact_steps == [*range(8)]


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize(("steps", "is_said"), [(1, False), (2, True)])
def test_a_training_that_ends_before(
    tmp_path: Path, steps: int, is_said: bool, exact: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", "lightning.pytorch.utilities.rank_zero"):
        fit(tmp_path, [ContextWarmup(steps, 12, exact)], batches(4), max_steps=2)
    line = f"ContextWarmup: rows are whole after {steps} steps; the training ends before, trainer.max_steps is 2"
    line += ", and attends exactly in every layer" * exact
    assert caplog.messages.count(line) == is_said


@pytest.mark.parametrize(("exact", "is_dense"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize(("step", "tokens"), [(0, 12), (3, 24), (4, None)])
def test_what_it_does_is_said(
    step: int, tokens: int | None, exact: bool, is_dense: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """The pieces with which the training, or what is left of it, begins; and that others attend exactly."""
    warmup, model = ContextWarmup(4, 12, exact), SimpleNamespace(seq_len=SEQ_LEN, attends_exactly=is_dense)
    trainer = SimpleNamespace(callbacks=[warmup], global_step=step, max_steps=8)
    with caplog.at_level("INFO", "lightning.pytorch.utilities.rank_zero"):
        warmup.on_train_start(trainer, model)
    line = f"ContextWarmup: rows are cut into pieces of {tokens} tokens, doubled until they are whole after 4 steps"
    line += "; every layer attends exactly until then" * (exact and not is_dense)
    assert [message for message in caplog.messages if "ContextWarmup" in message] == [line] * (tokens is not None)


@pytest.mark.parametrize("options", [{"steps": 0}, {"steps": 5, "start": 0}])
def test_mistakes(options: dict[str, int]) -> None:
    with pytest.raises(UserError, match=r"ContextWarmup: (steps|start) is 0; accepted: at least 1"):
        ContextWarmup(**options)


@pytest.mark.parametrize("start", [SEQ_LEN, 5 * SEQ_LEN])
def test_rows_no_longer_than_the_first_pieces_are_whole(
    tmp_path: Path, start: int, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", "lightning.pytorch.utilities.rank_zero"):
        watch, _, _ = fit(tmp_path, [ContextWarmup(8, start)], batches(4, packed=False), max_steps=2)
    assert [length for _, length in watch.seen] == [SEQ_LEN] * 4
    assert ContextWarmup(8, start).whole_from(SEQ_LEN) == 0
    line = f"ContextWarmup: rows are whole from the first step on; start is {start}, data.seq_len {SEQ_LEN}"
    assert [message for message in caplog.messages if "ContextWarmup" in message] == [line]
