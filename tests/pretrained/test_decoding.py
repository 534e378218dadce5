"""Greedy continuation against transformers, and against the whole text in one forward pass for each token."""

from typing import Any

import pytest
import torch
from torch import Tensor

from muse_lightning.attention import Dense, exact_attention
from muse_lightning.model import Llama, LlamaConfig
from muse_lightning.pretrained.decoding import generate_tokens
from tests.tiny import LargestTensor

SIZES: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,  # so that continuations vary
}


def random_model(kv_heads: int = 2, window: int | None = None) -> Llama:
    config = LlamaConfig(**SIZES, num_key_value_heads=kv_heads, sliding_window=window)
    llama = Llama(config, exact_attention(window))
    llama.init_weights()
    return llama.eval()


def greedy(logits: Tensor) -> int:
    return int(logits.argmax())


def prompt(length: int) -> list[int]:
    return torch.randint(101, (length,)).tolist()


@pytest.mark.parametrize("chunk", [1, 7, 2048], ids="chunk{}".format)
@pytest.mark.parametrize("window", [None, 6], ids="window{}".format)
@pytest.mark.parametrize("kv_heads", [1, 2, 4], ids="kv_heads{}".format)
def test_it_equals_the_whole_text_each_time(kv_heads: int, window: int | None, chunk: int) -> None:
    llama, ids = random_model(kv_heads, window), prompt(20)
    before = [block.self_attn.attention for block in llama.blocks]
    found = list(generate_tokens(llama, ids, greedy, max_new_tokens=25, prefill_chunk=chunk))
    assert [block.self_attn.attention for block in llama.blocks] == before
    for token in found:
        with torch.no_grad():
            assert int(llama(torch.tensor([ids]))[0, -1].argmax()) == token
        ids.append(token)
    assert len(set(found)) > 5


@pytest.mark.parametrize("window", [None, 6], ids="window{}".format)
@pytest.mark.parametrize("kv_heads", [1, 2, 4], ids="kv_heads{}".format)
def test_it_equals_transformers(kv_heads: int, window: int | None) -> None:
    transformers = pytest.importorskip("transformers")
    llama, ids = random_model(kv_heads, window), prompt(20)
    options = {**SIZES, "num_key_value_heads": kv_heads, "rms_norm_eps": 1e-5, "rope_theta": 500_000.0}
    options |= {"tie_word_embeddings": True, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    kind = "Llama" if window is None else "Mistral"
    if window is not None:
        options["sliding_window"] = window
    other = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**options)).eval()
    other.load_state_dict(llama.state_dict())
    expected = other.generate(torch.tensor([ids]), max_new_tokens=25, do_sample=False)[0, 20:].tolist()
    assert list(generate_tokens(llama, ids, greedy, max_new_tokens=25)) == expected


def test_it_ends_where_the_context_does() -> None:
    llama = random_model()
    assert len(list(generate_tokens(llama, prompt(60), greedy, max_new_tokens=100))) == 4
    assert len(list(generate_tokens(llama, prompt(63), greedy, max_new_tokens=100))) == 1
    for length in (0, 64, 70):
        with pytest.raises(ValueError, match=f"the prompt has {length} tokens, accepted: 1 to 63"):
            next(generate_tokens(llama, prompt(length), greedy, max_new_tokens=1))


def test_attention_is_exact_whatever_the_model_has() -> None:
    llama, ids = random_model(), prompt(20)
    expected = list(generate_tokens(llama, ids, greedy, max_new_tokens=10))
    with llama.attention_as(exact_attention(1)):
        assert list(generate_tokens(llama, ids, greedy, max_new_tokens=10)) == expected


def test_a_stopped_generation_gives_the_attention_back() -> None:
    llama = random_model()
    tokens = generate_tokens(llama, prompt(5), greedy, max_new_tokens=10)
    next(tokens)
    assert not isinstance(llama.blocks[0].self_attn.attention, Dense)
    tokens.close()
    assert isinstance(llama.blocks[0].self_attn.attention, Dense)


def test_logits_of_one_token_at_a_time() -> None:
    config = LlamaConfig(**{**SIZES, "vocab_size": 5000, "max_position_embeddings": 2048}, num_key_value_heads=2)
    llama = Llama(config, Dense)
    llama.init_weights()
    with LargestTensor() as largest:
        next(generate_tokens(llama.eval(), prompt(1000), greedy, max_new_tokens=1, prefill_chunk=100))
    # The embedding; a mask has 100 x 1,000 elements, logits of a chunk would have 100 x 5,000.
    assert largest.elements <= 5000 * 32


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 6], ids="window{}".format)
@pytest.mark.parametrize("kv_heads", [1, 4], ids="kv_heads{}".format)
def test_a_gpu_generates_what_the_cpu_does(kv_heads: int, window: int | None) -> None:
    llama, ids = random_model(kv_heads, window), prompt(20)
    expected = list(generate_tokens(llama, ids, greedy, max_new_tokens=25, prefill_chunk=7))
    assert list(generate_tokens(llama.cuda(), ids, greedy, max_new_tokens=25, prefill_chunk=7)) == expected


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 6], ids="window{}".format)
def test_half_precision_on_a_gpu(window: int | None) -> None:
    """Each token is nearly the most likely one given the whole text in float32."""
    llama, ids = random_model(2, window).cuda(), prompt(20)
    half = random_model(2, window).cuda()
    half.load_state_dict(llama.state_dict())
    for token in generate_tokens(half.bfloat16(), ids, greedy, max_new_tokens=25, prefill_chunk=7):
        with torch.no_grad():
            logits = llama(torch.tensor([ids]).cuda())[0, -1]
        # bf16 keeps 8 bits, 0.4 percent, over three layers.
        assert logits.max() - logits[token] < 0.05 * (logits.max() - logits.min())
        ids.append(token)
