"""Errors and mass by head, against masked softmax in float64 on the model's own q, k and v."""

import pytest
import torch
from torch import Tensor

from muse_kernels import muse_mass
from muse_lightning.attention.base import AttentionStrategy
from muse_lightning.compare.activations import middle_layer, on_activations
from muse_lightning.compare.blocks import Blocks
from muse_lightning.compare.settings import Setting
from muse_lightning.model import Llama
from tests.compare.conftest import CONFIG, MUSE


class Recorder(AttentionStrategy):
    """Masked softmax attention in float64 that keeps what it was given and what it gave."""

    def __init__(self, layer_idx: int, window: int = 10**6) -> None:
        super().__init__(layer_idx)
        self.window = window

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, softmax_scale: float, cu_seqlens: Tensor | None = None
    ) -> Tensor:
        length = q.shape[2]
        index = torch.arange(length)
        document = torch.zeros(length) if cu_seqlens is None else torch.searchsorted(cu_seqlens, index, right=True)
        age = index[:, None] - index
        is_seen = (age >= 0) & (age < self.window) & (document[:, None] == document)
        logits = q.double() @ k.double().repeat_interleave(q.shape[1] // k.shape[1], 1).mT * softmax_scale
        weights = logits.masked_fill(~is_seen, -torch.inf).softmax(-1)
        self.seen = q, k, v, softmax_scale, cu_seqlens
        return (weights @ v.double().repeat_interleave(q.shape[1] // k.shape[1], 1)).to(q.dtype)


@pytest.fixture
def recorded(llama: Llama, blocks: Blocks) -> list[list[tuple[Tensor, ...]]]:
    """By batch and layer: q, k, v, softmax_scale, cu_seqlens of the exact model."""
    found = []
    with torch.no_grad(), llama.attention_as(Recorder):
        for batch in blocks.batches:
            llama(batch["input_ids"], cu_seqlens=batch.get("cu_seqlens"))
            found.append([block.self_attn.attention.seen for block in llama.blocks])
    return found


def test_errors_are_those_on_exact_activations(
    llama: Llama, blocks: Blocks, settings: list[Setting], recorded: list[list[tuple]]
) -> None:
    found = on_activations(llama, blocks.batches, settings, with_mass=[])
    assert not found["Dense"].errors.any()
    expected = torch.zeros(2, 4, dtype=torch.float64)
    for layers in recorded:
        for layer, (q, k, v, scale, documents) in enumerate(layers):
            exact, other = (
                Recorder(0, window)(q, k, v, softmax_scale=scale, cu_seqlens=documents) for window in (10**6, 12)
            )
            error = (other - exact).double().square().sum((0, 2, 3)) / exact.double().square().sum((0, 2, 3))
            expected[layer] += error / len(recorded)
    assert expected.min() > 1e-3
    torch.testing.assert_close(found["SlidingWindow 12"].errors, expected, rtol=1e-4, atol=0)


def test_mass_is_that_of_the_operator(
    llama: Llama, blocks: Blocks, settings: list[Setting], recorded: list[list[tuple]]
) -> None:
    found = on_activations(llama, blocks.batches[:1], settings[1:], with_mass=["Muse"])["Muse"].mass
    assert found is not None
    assert found.shape == (CONFIG.num_hidden_layers, CONFIG.num_attention_heads, 3)
    torch.testing.assert_close(found.sum(-1), torch.ones(2, 4, dtype=torch.float64))
    q, k, _, scale, documents = recorded[0][1]
    options = {name: getattr(MUSE, name) for name in ("chunk", "query_cluster", "key_cluster", "top_k", "candidates")}
    shares = muse_mass(q, k, cu_seqlens=documents, softmax_scale=scale, exact_below=16, **options)
    torch.testing.assert_close(found[1, :, 1], shares.retrieved.double().mean((0, 2)), rtol=1e-3, atol=1e-6)
    assert found[..., 1].min() > 0


def test_the_middle_layer(llama: Llama, blocks: Blocks, recorded: list[list[tuple]]) -> None:
    found = middle_layer(llama, blocks.batches[0])
    q, k, v, scale, _ = recorded[0][1]
    for mine, expected in ((found.q, q), (found.k, k), (found.v, v)):
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-5)
    assert found.options["softmax_scale"] == scale
    assert found.layer == 1
