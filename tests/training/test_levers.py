"""The order of levers, what is advised, and the longest context against the prediction it is the edge of."""

import re
from itertools import islice
from typing import Any

import pytest

from muse_lightning.attention import Dense, Muse
from muse_lightning.model import load_preset
from muse_lightning.training import levers as under_test
from muse_lightning.training.levers import USABLE, Setting, levers, longest_contexts, next_lever
from muse_lightning.training.module import LanguageModel

GIB = 2**30


def setting(attention: Any = Dense, batch_size: int = 1, accumulate: int = 2, **options: Any) -> Setting:
    config = load_preset("demo", vocab_size=32768, num_hidden_layers=2)
    model = LanguageModel(config, attention, warmup_steps=0, **({"recompute": "block"} | options))
    return Setting(model, batch_size, 4096, accumulate, "bf16-mixed")


def pulled_one_after_the_other(start: Setting) -> list[str]:
    said = []
    while (following := next(levers(start), None)) is not None:
        start = following
        said.append(start.said)
    return said


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            {"recompute": "none", "batch_size": 4},
            [
                "data.batch_size=1 trainer.accumulate_grad_batches=8",
                "model.loss_chunk=1024",
                "model.recompute=keep_attention",
                "model.recompute=block",
                "model.offload=true",
                "model.mlp_tiles=8",
            ],
        ),
        ({"loss_chunk": 512, "mlp_tiles": 16}, ["model.offload=true"]),
        (
            {"recompute_every": 2, "mlp_tiles": 8, "loss_chunk": 1024},
            ["model.recompute_every=1", "model.offload=true"],
        ),
        ({"mlp_tiles": 8, "loss_chunk": 1024, "offload": True}, []),
    ],
)
def test_the_order(options: dict[str, Any], expected: list[str]) -> None:
    assert pulled_one_after_the_other(setting(**options)) == expected


def test_the_first_that_is_worth_its_while_is_advised() -> None:
    """A large vocabulary: the loss. A wide feed-forward network: tiles, though the loss comes first in the order."""
    assert (next_lever(setting(loss_chunk=4096)) or "").startswith("model.loss_chunk=1024 (predicted peak ")
    config = load_preset("demo", intermediate_size=8192)
    wide = Setting(LanguageModel(config, Dense, recompute="block", offload=True), 1, 4096, 1, "32-true")
    said = next_lever(wide)
    assert said is not None
    assert said.startswith("model.mlp_tiles=8 (predicted peak ")
    after, before = map(float, re.findall(r"\d+\.\d", said))
    assert before == round(wide.peak() / GIB, 1)
    assert after < before


def test_nothing_is_advised_where_nothing_helps() -> None:
    assert next_lever(setting(mlp_tiles=8, loss_chunk=1024, offload=True)) is None


@pytest.mark.parametrize("attention", [Dense, Muse], ids=["Dense", "Muse"])
def test_the_longest_context(attention: Any) -> None:
    """It fits, a fiftieth or a chunk more does not, and each lever makes it longer."""
    kept = {"recompute": "block", "offload": True, "loss_chunk": 1024}
    model = LanguageModel(load_preset("demo", num_hidden_layers=1), attention, **kept)
    start, memory = Setting(model, 1, 4096, 1, "bf16-mixed"), 2**27
    found = list(islice(longest_contexts(start, memory), 2))
    assert [said for said, _ in found] == ["as it is", "model.mlp_tiles=8"]
    longest = found[0][1]
    unit = 2048 if attention is Muse else 1024
    assert longest % unit == 0
    assert start.peak(longest) <= USABLE * memory
    assert start.peak(int(longest * 1.05) + unit) > USABLE * memory
    assert 0 < longest < found[1][1]


def test_contexts_are_whole_chunks_beside_exact_heads() -> None:
    model = LanguageModel(load_preset("demo", num_hidden_layers=1), Muse, exact_heads=1, recompute="block")
    start = Setting(model, 1, 4096, 1, "bf16-mixed")
    found = [next(longest_contexts(start, eighths * 2**24))[1] for eighths in range(6, 12)]
    assert len(set(found)) > 3
    assert [longest % 2048 for longest in found] == [0] * 6


@pytest.mark.parametrize("begin", [1024, 2**16])
def test_the_search_ends_wherever_it_begins(begin: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a peak that has a bend, as where another phase takes the lead."""
    asked: list[int] = []

    def peak(self: Setting, seq_len: int) -> int:
        asked.append(seq_len)
        return max(10**8 + 1000 * seq_len, 5 * 10**7 + 4000 * seq_len)

    monkeypatch.setattr(Setting, "peak", peak)
    start = Setting(setting().model, 1, begin, 1, "32-true")
    longest = under_test._longest(start, 2 * 10**8, 1024)
    assert 0.97 * 37_500 < longest <= 37_500
    assert len(asked) <= 8


def test_a_model_that_does_not_fit_at_all() -> None:
    assert next(longest_contexts(setting(), 10 * 2**20)) == ("as it is", 0)
