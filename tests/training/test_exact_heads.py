"""The heads that a model takes from a checkpoint, and what is said of them."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from muse_lightning.attention import Dense
from muse_lightning.callbacks import ContextWarmup, ExactHeads, ExactTail
from muse_lightning.errors import NumericsError
from muse_lightning.numerics.failed_step import KEY
from muse_lightning.numerics.guard import NumericsGuard
from muse_lightning.training.module import LanguageModel
from tests.sharp_heads import (
    Watch,
    checkpoint_of,
    heads_of,
    lines_of_heads,
    sharp_model,
)
from tests.tiny import TinyData, batches, tiny_model, tiny_muse, tiny_trainer

VERBS = pytest.mark.parametrize("verb", ["validate", "test", "predict"])


def validated(model: LanguageModel, folder: Path, ckpt_path: Path | None = None) -> list[tuple[int, ...]]:
    """The heads that a validation had."""
    tiny_trainer(folder).validate(model, TinyData([], batches(1)), ckpt_path=ckpt_path, verbose=False)
    return heads_of(model)


def evaluate(verb: str, model: LanguageModel, folder: Path, ckpt_path: Path | None = None) -> None:
    options = {} if verb == "predict" else {"verbose": False}
    getattr(tiny_trainer(folder), verb)(model, TinyData([], batches(1)), ckpt_path=ckpt_path, **options)


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return lines_of_heads(monkeypatch)


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


def test_a_choice_is_of_its_layers(tmp_path: Path) -> None:
    model = tiny_model(attention=tiny_muse, exact_layers=(0,), exact_heads=1)
    model.choose_heads({1: [1]})
    path = checkpoint_of(model, tmp_path)
    for exact_layers, heads in (((0,), [(1,)]), ((1,), [(0,)])):
        other = tiny_model(attention=tiny_muse, exact_layers=exact_layers, exact_heads=1)
        assert validated(other, tmp_path / str(exact_layers), path) == heads
    model = tiny_model(attention=tiny_muse, exact_heads=1, config={"num_hidden_layers": 2})
    assert validated(model, tmp_path / "none", path) == [(0,), ()]


def test_a_checkpoint_of_the_tail_has_the_choice_before_it(tmp_path: Path) -> None:
    path = checkpoint_of(sharp_model(), tmp_path, ExactHeads(), ExactTail(0.5), steps=2)
    assert validated(tiny_model(attention=tiny_muse, exact_heads=2), tmp_path / "b", path) == [(1,), (0,)]


@VERBS
@pytest.mark.parametrize(("count", "are"), [(1, "1 head is"), (2, "2 heads are")])
def test_an_evaluation_without_a_checkpoint_says_that_heads_are_spread(
    tmp_path: Path, lines: list[str], verb: str, count: int, are: str
) -> None:
    path = checkpoint_of(sharp_model(), tmp_path, ExactHeads())
    said = (
        f"model.exact_heads: {are} exact, evenly spread; a training's choice comes with its checkpoint (--ckpt_path), "
        "for as many heads in the same layers"
    )
    for weights in (path, None):
        lines.clear()
        model = tiny_model(attention=tiny_muse, exact_heads=count, weights=weights)
        evaluate(verb, model, tmp_path / str(weights is None))
        assert lines == [said]


@VERBS
def test_an_evaluation_says_which_heads_its_checkpoint_has(tmp_path: Path, lines: list[str], verb: str) -> None:
    path = checkpoint_of(sharp_model(), tmp_path, ExactHeads())
    assert lines == ["step 0: exact key-value heads by layer: 0: [1], 1: [0]"]
    lines.clear()
    evaluate(verb, tiny_model(attention=tiny_muse, exact_heads=2), tmp_path / "other", path)
    assert lines == ["model.exact_heads: exact key-value heads by layer: 0: [1], 1: [0], as the checkpoint has them"]


def test_layers_without_exact_heads_are_not_named(tmp_path: Path, lines: list[str]) -> None:
    model = tiny_model(attention=tiny_muse, exact_heads=2)
    model.choose_heads({0: [], 1: [0, 1]})
    path = checkpoint_of(model, tmp_path)
    validated(tiny_model(attention=tiny_muse, exact_heads=2), tmp_path / "other", path)
    assert lines == ["model.exact_heads: exact key-value heads by layer: 1: [0, 1], as the checkpoint has them"]


@VERBS
@pytest.mark.parametrize("heads", [{}, None])
def test_an_evaluation_says_that_its_checkpoint_has_no_choice(
    tmp_path: Path, lines: list[str], verb: str, heads: dict[int, list[int]] | None
) -> None:
    path = checkpoint_of(tiny_model(attention=tiny_muse), tmp_path)
    if heads is None:  # as older ones are
        checkpoint = torch.load(path, weights_only=True)
        del checkpoint["exact_heads"], checkpoint["are_exact_heads_chosen"]
        torch.save(checkpoint, path)
    evaluate(verb, tiny_model(attention=tiny_muse, exact_heads=2), tmp_path / "other", path)
    assert lines == [
        f"model.exact_heads: 2 heads are exact, evenly spread; checkpoint {path} has no choice of its training"
    ]


@VERBS
@pytest.mark.parametrize(
    ("callbacks", "steps"),
    [([], 1), ([ContextWarmup(steps=3, start=24), ExactHeads()], 2)],
    ids=["where it began", "rows that were cut"],
)
def test_an_evaluation_says_that_the_training_of_its_checkpoint_had_not_chosen(
    tmp_path: Path, lines: list[str], verb: str, callbacks: list[L.Callback], steps: int
) -> None:
    path = checkpoint_of(sharp_model(), tmp_path, *callbacks, steps=steps)
    lines.clear()
    evaluate(verb, tiny_model(attention=tiny_muse, exact_heads=2), tmp_path / "other", path)
    assert lines == [
        "model.exact_heads: exact key-value heads by layer: 0: [0], 1: [0], as the checkpoint has them; its training "
        "had not chosen any"
    ]


def test_heads_of_an_older_checkpoint_are_a_choice(tmp_path: Path, lines: list[str]) -> None:
    path = checkpoint_of(sharp_model(), tmp_path, ExactHeads())
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["are_exact_heads_chosen"]
    torch.save(checkpoint, path)
    lines.clear()
    evaluate("validate", tiny_model(attention=tiny_muse, exact_heads=2), tmp_path / "other", path)
    assert lines == ["model.exact_heads: exact key-value heads by layer: 0: [1], 1: [0], as the checkpoint has them"]


@pytest.mark.parametrize(
    ("options", "here"),
    [
        ({"exact_heads": 0}, "none here"),
        ({"exact_heads": 3}, "3 heads of layers 0, 1 here, evenly spread"),
        ({"exact_heads": 1, "exact_layers": (0,)}, "1 head of layer 1 here, evenly spread"),
    ],
)
def test_an_evaluation_by_others_than_the_checkpoints_names_both(
    tmp_path: Path, lines: list[str], options: dict[str, Any], here: str
) -> None:
    path = checkpoint_of(sharp_model(), tmp_path, ExactHeads())
    lines.clear()
    validated(tiny_model(attention=tiny_muse, **options), tmp_path / "other", path)
    assert lines == [
        f"checkpoint {path}: the exact heads of its training are not used: 2 heads of layers 0, 1 there, {here} "
        "(model.exact_heads, model.exact_layers)"
    ]


@pytest.mark.parametrize(
    "options",
    [
        {"exact_heads": 4},
        {"exact_heads": 2, "exact_layers": (0,)},
        {"attention": Dense},
        {"attention": Dense, "exact_heads": 2},
        {"exact_layers": (0, 1)},
    ],
)
def test_nothing_is_said_where_everything_is_exact(tmp_path: Path, lines: list[str], options: dict[str, Any]) -> None:
    chosen = checkpoint_of(sharp_model(), tmp_path / "chosen", ExactHeads())
    alike = checkpoint_of(tiny_model(**({"attention": tiny_muse} | options)), tmp_path / "alike")
    lines.clear()
    for path in (chosen, alike, None):
        validated(tiny_model(**({"attention": tiny_muse} | options)), tmp_path / "other", path)
    assert lines == []


def test_a_fit_says_which_choice_it_goes_on_with(tmp_path: Path, lines: list[str]) -> None:
    """Or that it does not, and nothing of heads that were not chosen: it will choose."""
    chosen = checkpoint_of(sharp_model(), tmp_path / "chosen", ExactHeads())
    unchosen = checkpoint_of(sharp_model(), tmp_path / "unchosen")
    lines.clear()
    for number, (path, count) in enumerate([(None, 2), (chosen, 2), (unchosen, 2), (chosen, 1)]):
        trainer = tiny_trainer(tmp_path / str(number), max_steps=2)
        trainer.fit(sharp_model(exact_heads=count), TinyData(batches(2), batches(1)), ckpt_path=path)
    assert lines == [
        "model.exact_heads: exact key-value heads by layer: 0: [1], 1: [0], as the checkpoint has them",
        f"checkpoint {chosen}: the exact heads of its training are not used: 2 heads of layers 0, 1 there, 1 head of "
        "layers 0, 1 here (model.exact_heads, model.exact_layers)",
    ]


def test_a_checkpoint_without_a_choice_has_none(tmp_path: Path) -> None:
    path = checkpoint_of(tiny_model(attention=tiny_muse, exact_heads=2), tmp_path)
    assert not torch.load(path, weights_only=True)["are_exact_heads_chosen"]
    model = tiny_model(attention=tiny_muse, exact_heads=2)
    assert validated(model, tmp_path / "b", path) == [(0,), (0,)]
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
