"""Losses against cross_entropy of all logits."""

import math
import statistics

import pytest
import torch
import torch.nn.functional as F

from muse_lightning.compare.blocks import Blocks
from muse_lightning.compare.losses import Losses, losses
from muse_lightning.compare.settings import Setting
from muse_lightning.errors import UserError
from muse_lightning.model import Llama
from muse_lightning.model.rope import document_positions


def nats_of(llama: Llama, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    logits = llama(batch["input_ids"], cu_seqlens=batch.get("cu_seqlens"))
    return F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="none")


def test_they_are_cross_entropy(llama: Llama, blocks: Blocks) -> None:
    found = losses(llama, blocks, loss_chunk=7)
    with torch.no_grad():
        expected = [nats_of(llama, batch) for batch in blocks.batches]
    assert found.nats == pytest.approx([nats.sum().item() for nats in expected], rel=1e-5)
    assert found.mean == pytest.approx(sum(found.nats) / sum(blocks.labels()))
    assert found.bits_per_byte == pytest.approx(sum(found.nats) / math.log(2) / sum(blocks.text_bytes()))
    in_bucket = []
    for batch, nats in zip(blocks.batches, expected, strict=True):
        length = batch["input_ids"].shape[1]
        positions = document_positions(batch["cu_seqlens"], 1, length)[0] if "cu_seqlens" in batch else range(length)
        in_bucket += [nats[i].item() for i, p in enumerate(positions) if 8 <= p + 1 < 16 and batch["labels"][0, i] >= 0]
    assert found.counts[3] == len(in_bucket)
    assert found.by_context[3] == pytest.approx(statistics.mean(in_bucket), rel=1e-5)


def test_a_strategy_makes_a_difference(llama: Llama, blocks: Blocks, settings: list[Setting]) -> None:
    exact = losses(llama, blocks, loss_chunk=64)
    for setting in settings[1:]:
        with llama.attention_as(setting.attention):
            assert losses(llama, blocks, loss_chunk=64).nats != exact.nats


def test_the_rise_and_its_standard_error() -> None:
    exact = Losses([10.0, 30.0], [10, 10], [1, 1], [], [])
    other = Losses([11.0, 33.0], [10, 10], [1, 1], [], [])
    rise, error = other.rise(exact)
    assert rise == pytest.approx(0.2)
    assert error == pytest.approx(statistics.stdev([0.1, 0.3]) / math.sqrt(2))
    assert Losses([2.0], [1], [0], [], []).rise(Losses([1.0], [1], [0], [], [])) == (1.0, None)
    assert Losses([2.0], [1], [0], [], []).bits_per_byte is None


def test_a_loss_that_is_not_finite_names_the_dtype(llama: Llama, blocks: Blocks) -> None:
    with torch.no_grad():
        llama.model.norm.weight[0] = math.nan
    with pytest.raises(UserError, match=r"the loss is nan in torch\.float32"):
        losses(llama, blocks, loss_chunk=64)
