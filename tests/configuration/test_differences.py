"""What a recipe says otherwise than the run before: each value once, in one line."""

from typing import Any

import pytest

from muse_lightning.configuration.differences import differences

BEFORE = {
    "trainer": {"max_steps": 10, "callbacks": None},
    "model": {"attention": {"class_path": "Muse", "init_args": {"top_k": 2}}},
}


@pytest.mark.parametrize(
    ("now", "lines"),
    [
        (BEFORE, []),
        (
            BEFORE | {"trainer": {"max_steps": 20, "callbacks": None}},
            ["trainer.max_steps: 10 in X, 20 in this recipe, which wins"],
        ),
        (
            BEFORE | {"model": {"attention": {"class_path": "Dense"}}},
            ["model.attention.class_path: Muse in X, Dense in this recipe, which wins"],
        ),
        (BEFORE | {"data": {}}, ["data: not given in X, {} in this recipe, which wins"]),
        (
            BEFORE | {"data": {"sources": ["a" * 100, "b\nc"]}},
            [f"data.sources: not given in X, ['{'a' * 55}... in this recipe, which wins"],
        ),
        (BEFORE | {"run": {"name": "x"}, "ckpt_path": "last", "resume": True}, []),
    ],
    ids=["same", "value", "class", "group", "long", "of-the-start"],
)
def test_differences(now: dict[str, Any], lines: list[str]) -> None:
    assert differences(BEFORE, now, "X") == lines


def of_callbacks(*callbacks: tuple[str, dict[str, Any]]) -> dict[str, Any]:
    return {"trainer": {"callbacks": [{"class_path": name, "init_args": options} for name, options in callbacks]}}


@pytest.mark.parametrize(
    ("now", "lines"),
    [
        ([("Ngram", {"tokens": 9}), ("Warmup", {"steps": 5})], ["[1].init_args.steps: 3 in X, 5 in this recipe"]),
        ([("Ngram", {"tokens": 9}), ("Tail", {"steps": 5})], ["[1].class_path: Warmup in X, Tail in this recipe"]),
        ([("Ngram", {"tokens": 9})], ["[1].class_path: Warmup in X, not given in this recipe"]),
        (
            [("Ngram", {"tokens": 9}), ("Warmup", {"steps": 3}), ("Tail", {"fraction": 1})],
            ["[2].class_path: not given in X, Tail in this recipe"],
        ),
        ([], [": [{'class_path': 'Ngram', 'init_args': {'tokens': 9}}, {'c... in X, [] in this recipe"]),
    ],
    ids=["argument", "class", "fewer", "more", "none"],
)
def test_callbacks_one_by_one(now: list[tuple[str, dict[str, Any]]], lines: list[str]) -> None:
    before = of_callbacks(("Ngram", {"tokens": 9}), ("Warmup", {"steps": 3}))
    assert differences(before, of_callbacks(*now), "X") == [f"trainer.callbacks{line}, which wins" for line in lines]


@pytest.mark.parametrize("name", ["learning_rate", "weight_decay", "betas", "eps", "momentum"])
def test_what_the_training_says_itself(name: str) -> None:
    assert differences({"model": {name: 1.0}}, {"model": {name: 2.0}}, "X") == []
