"""The error of a model's attention, layer by layer."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from muse_lightning.attention import AttentionStrategy, Dense, SlidingWindow
from muse_lightning.measure.attention_error import attention_errors, relative_squared_error
from tests.tiny import batches, tiny_model


class Scaled(Dense):
    """Exact attention times (1 + layer): its relative squared error is layer^2."""

    def forward(self, *qkv: Tensor, **options: Tensor) -> Tensor:
        return super().forward(*qkv, **options) * (1 + self.layer_idx)


class Mixed(AttentionStrategy):
    """Heads by two strategies: half of them exact, half scaled."""

    def __init__(self, layer_idx: int) -> None:
        super().__init__(layer_idx)
        self.parts = torch.nn.ModuleList([Dense(layer_idx), Scaled(layer_idx)])

    def forward(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        halves = zip(self.parts, *(x.chunk(2, dim=1) for x in (q, k, v)), strict=True)
        return torch.cat([part(*qkv, **options) for part, *qkv in halves], dim=1)

    def pairs(self, *lengths: Any, **options: Any) -> float:
        return self.parts[0].pairs(*lengths, **options)


def test_relative_squared_error() -> None:
    exact = torch.tensor([3.0, 4.0])
    assert relative_squared_error(exact + torch.tensor([0.0, 1.0]), exact).item() == pytest.approx(1 / 25)
    # Differences are taken in float32: in bf16 this one would vanish.
    near = torch.tensor([256.0, 1.0], dtype=torch.bfloat16)
    assert relative_squared_error(near, near.float() + 0.5).item() > 0


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(("attention", "expected"), [(Dense, [0, 0]), (Scaled, [0, 1])])
def test_each_layer_is_compared_on_its_own_input(
    attention: type[AttentionStrategy], expected: list[float], packed: bool
) -> None:
    model = tiny_model(attention=attention)
    model.configure_model()
    (batch,) = batches(1, packed=packed)
    errors = attention_errors(model.llama, batch["input_ids"], batch.get("cu_seqlens"))
    assert errors.tolist() == pytest.approx(expected, abs=1e-9)
    assert not any(module._forward_hooks for module in model.llama.modules())


def test_a_strategy_of_others_is_one_layer() -> None:
    model = tiny_model(attention=Mixed)
    model.configure_model()
    (batch,) = batches(1)
    first, second = attention_errors(model.llama, batch["input_ids"], batch["cu_seqlens"]).tolist()
    assert first == pytest.approx(0.0, abs=1e-9)
    assert 0.0 < second < 1.0


def test_exact_is_what_the_model_was_trained_with() -> None:
    config = {"sliding_window": 5, "initializer_range": 0.5}
    (batch,) = batches(1)
    for attention, is_exact in ((partial(SlidingWindow, window=5), True), (Dense, False)):
        model = tiny_model(config=config, attention=attention)
        model.configure_model()
        errors = attention_errors(model.llama, batch["input_ids"], batch["cu_seqlens"])
        assert (errors.max().item() < 1e-9) == is_exact
