"""Cosines of gradients against autograd on all logits."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from muse_lightning.attention import Dense
from muse_lightning.compare.blocks import Blocks
from muse_lightning.compare.gradients import gradient_cosines
from muse_lightning.compare.settings import Setting
from muse_lightning.model import Llama


def gradient(llama: Llama, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    logits = llama(batch["input_ids"], cu_seqlens=batch.get("cu_seqlens"))
    loss = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())
    return torch.cat([x.flatten() for x in torch.autograd.grad(loss, list(llama.parameters()))]).double()


def test_they_are_those_of_the_loss(llama: Llama, blocks: Blocks, settings: list[Setting]) -> None:
    batch = blocks.batches[0]
    with llama.attention_as(settings[0].attention):
        exact = gradient(llama, batch)
    expected = {}
    for setting in settings[1:]:
        with llama.attention_as(setting.attention):
            expected[setting.name] = F.cosine_similarity(gradient(llama, batch), exact, dim=0).item()
    found = gradient_cosines(llama, batch, settings[0], settings, loss_chunk=32)
    assert found.pop("Dense") == pytest.approx(1)
    assert found == pytest.approx(expected, abs=1e-4)
    assert all(cosine < 0.999 for cosine in found.values())


def test_no_gradient_has_no_direction(llama: Llama, blocks: Blocks, settings: list[Setting]) -> None:
    with torch.no_grad():
        for parameter in llama.parameters():
            parameter.zero_()
    for batch in blocks.batches:
        batch["labels"].fill_(-100)
        batch["labels"][0, 0] = 0
    found = gradient_cosines(llama, blocks.batches[0], settings[0], settings[1:2], loss_chunk=32)
    assert math.isnan(found["Muse"])


class Counted(Dense):
    calls = 0

    def forward(self, *args: torch.Tensor, **options: Any) -> torch.Tensor:
        Counted.calls += 1
        return super().forward(*args, **options)


def test_blocks_are_computed_again(llama: Llama, blocks: Blocks, settings: list[Setting]) -> None:
    """Or a long context would not fit."""
    Counted.calls = 0
    counted = replace(settings[0], name="counted", attention=Counted)
    gradient_cosines(llama, blocks.batches[0], settings[0], [counted], loss_chunk=32)
    assert Counted.calls == 2 * len(llama.blocks)
