"""The decoder: documents do not see each other, strategies swap, the meta device, initialisation."""

import math

import pytest
import torch

import muse_lightning.model.llama as llama_module
from muse_lightning.attention import Dense, Muse, SlidingWindow, SpatialBlocks
from muse_lightning.model import Llama, LlamaConfig

CONFIG = LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    initializer_range=0.3,
)


def small_muse(layer):
    return Muse(layer, chunk=16, query_cluster=4, key_cluster=4, top_k=1, exact_below=0)


def small_blocks(layer):
    return SpatialBlocks(layer, chunk=16, query_cluster=4, key_cluster=4, top_k=1, exact_below=0)


def small_window(layer):
    return SlidingWindow(layer, window=16)


STRATEGIES = {"dense": Dense, "muse": small_muse, "spatial": small_blocks, "window": small_window}


def model(attention=Dense, config=CONFIG):
    llama = Llama(config, attention)
    llama.init_weights()
    return llama.eval()


@pytest.mark.parametrize("attention", STRATEGIES.values(), ids=STRATEGIES)
def test_packed_equals_separate_documents(attention):
    lengths = [[70, 26], [5, 1, 90]]
    input_ids = torch.randint(64, (2, 96))
    cu_seqlens = torch.tensor([0, 70, 96, 101, 102, 192, 192, 192], dtype=torch.int32)
    llama = model(attention)
    with torch.no_grad():
        packed = llama(input_ids, cu_seqlens=cu_seqlens)
        for row, row_lengths in enumerate(lengths):
            separate = [llama(document[None])[0] for document in input_ids[row].split(row_lengths)]
            # Another order of additions: float32 rounding through two layers.
            torch.testing.assert_close(packed[row], torch.cat(separate), atol=1e-4, rtol=1e-4)


def test_position_ids_override():
    llama = model()
    input_ids = torch.randint(64, (1, 24))
    with torch.no_grad():
        default = llama(input_ids)
        # RoPE knows only differences of positions.
        torch.testing.assert_close(
            llama(input_ids, position_ids=torch.arange(100, 124)[None]), default, atol=1e-4, rtol=0
        )
        stretched = llama(input_ids, position_ids=3 * torch.arange(24)[None])
    assert not torch.allclose(stretched, default, atol=1e-2)


def test_same_state_dict_whatever_the_strategy():
    names = {name: list(model(attention).state_dict()) for name, attention in STRATEGIES.items()}
    assert len(names) == 4
    assert all(found == names["dense"] for found in names.values())
    assert "model.layers.0.self_attn.q_proj.weight" in names["dense"]


def test_attention_as_swaps_and_restores():
    llama = model(small_muse)
    before = [block.self_attn.attention for block in llama.blocks]
    input_ids = torch.randint(64, (1, 96))
    exact = model(Dense)
    exact.load_state_dict(llama.state_dict())
    with torch.no_grad():
        own = llama(input_ids)
        with llama.attention_as(Dense):
            assert torch.equal(llama(input_ids), exact(input_ids))
        assert torch.equal(llama(input_ids), own)
        assert not torch.equal(own, exact(input_ids))
    with pytest.raises(RuntimeError, match="inside"), llama.attention_as(Dense):
        raise RuntimeError("inside")
    assert all(block.self_attn.attention is old for block, old in zip(llama.blocks, before, strict=True))


def test_set_attention_numbers_layers():
    llama = model(Dense)
    llama.set_attention(small_window)
    assert [type(block.self_attn.attention) for block in llama.blocks] == [SlidingWindow] * 2
    assert [block.self_attn.attention.layer_idx for block in llama.blocks] == [0, 1]
    assert not any(block.self_attn.attention.training for block in llama.blocks)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_meta_device_then_real(tied):
    config = LlamaConfig(**(vars(CONFIG) | {"tie_word_embeddings": tied}))
    with torch.device("meta"):
        llama = Llama(config, Dense)
    llama.to_empty(device="cpu")
    llama.init_weights(torch.Generator().manual_seed(1))
    assert (llama.lm_head.weight is llama.model.embed_tokens.weight) == tied
    assert torch.isfinite(llama(torch.randint(64, (1, 8)))).all()

    again = Llama(config, Dense)
    again.init_weights(torch.Generator().manual_seed(1))
    assert all(torch.equal(a, b) for a, b in zip(llama.parameters(), again.parameters(), strict=True))


def test_initial_standard_deviations():
    biases = dict.fromkeys(("attention_bias", "attention_output_bias", "mlp_bias", "qk_norm"), True)
    sizes = {"hidden_size": 256, "intermediate_size": 256, "initializer_range": 0.02}
    llama = model(config=LlamaConfig(**(vars(CONFIG) | sizes | biases)))
    assert sum(name.endswith(".bias") for name, _ in llama.named_parameters()) == 2 * 7
    residual = {"o_proj", "down_proj"}
    for name, parameter in llama.named_parameters():
        if "norm" in name:
            assert (parameter == 1).all()
        elif name.endswith(".bias"):
            assert (parameter == 0).all()
        else:
            expected = 0.02 / math.sqrt(2 * 2) if name.split(".")[-2] in residual else 0.02
            # At least 16,384 draws: the sample's standard deviation is within 1 % by two of its own errors.
            assert parameter.std().item() == pytest.approx(expected, rel=0.03)


def test_bfloat16_model_runs():
    llama = model().bfloat16()
    assert llama(torch.randint(64, (1, 8))).dtype == torch.bfloat16


def test_mixed_precision_gives_the_strategy_one_dtype():
    seen = []

    class Watched(Dense):
        def forward(self, q, k, v, **options):
            seen.append((q.dtype, k.dtype, v.dtype))
            return super().forward(q, k, v, **options)

    llama = model(Watched, LlamaConfig(**(vars(CONFIG) | {"qk_norm": True, "attention_bias": True})))
    with torch.autocast("cpu", torch.bfloat16):
        llama(torch.randint(64, (1, 8)))
    assert seen == [(torch.bfloat16,) * 3] * 2


def test_positions_restart_per_document(monkeypatch):
    # Attention within a document knows only differences of positions: what restarts them shows in precision alone.
    seen = []
    rotation = llama_module.rotation

    def watched(config, position_ids):
        seen.append(position_ids.tolist())
        return rotation(config, position_ids)

    monkeypatch.setattr(llama_module, "rotation", watched)
    model()(torch.zeros(2, 5, dtype=torch.long), cu_seqlens=torch.tensor([0, 2, 5, 10, 10], dtype=torch.int32))
    model()(torch.zeros(1, 3, dtype=torch.long))
    assert seen == [[[0, 1, 0, 1, 2], [0, 1, 2, 3, 4]], [[0, 1, 2]]]
