"""Tokens one after another: the prompt in chunks, then one token per forward pass, with a cache of keys and values."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from muse_lightning.attention.cached import CachedAttention
from muse_lightning.model.llama import Llama

PREFILL_CHUNK = 2048
"""Tokens of the prompt in one forward pass: bounds the memory of activations."""


def generate_tokens(
    llama: Llama,
    prompt: Sequence[int],
    choose: Callable[[Tensor], int],
    *,
    max_new_tokens: int,
    prefill_chunk: int = PREFILL_CHUNK,
) -> Iterator[int]:
    """Tokens that continue a prompt, by exact attention, until the context of the model is full.

    Logits exist for one token at a time.

    Args:
        llama: the model, in evaluation mode.
        prompt: ids, at least one and fewer than `max_position_embeddings`.
        choose: logits [V] of the next token to its id.
        max_new_tokens: at most so many are generated.
        prefill_chunk: tokens of the prompt in one forward pass.
    Raises:
        ValueError: the prompt is empty or fills the context.
    """
    limit = llama.config.max_position_embeddings
    if not 0 < len(prompt) < limit:
        raise ValueError(f"the prompt has {len(prompt)} tokens, accepted: 1 to {limit - 1}")
    device = llama.lm_head.weight.device
    with llama.attention_as(partial(CachedAttention, window=llama.config.sliding_window)):
        pending, position = list(prompt), 0
        for _ in range(min(max_new_tokens, limit - len(prompt))):
            for start in range(0, len(pending), prefill_chunk):
                chunk = torch.tensor([pending[start : start + prefill_chunk]], device=device)
                hidden = _forward(llama, chunk, position)
                position += chunk.shape[1]
            token = choose(_logits(llama, hidden))
            yield token
            pending = [token]


@torch.inference_mode()
def _forward(llama: Llama, chunk: Tensor, position: int) -> Tensor:
    """Final state of the last token of a chunk, [E]."""
    positions = torch.arange(position, position + chunk.shape[1], device=chunk.device)[None]
    return llama.hidden_states(chunk, position_ids=positions)[0, -1]


@torch.inference_mode()
def _logits(llama: Llama, hidden: Tensor) -> Tensor:
    return llama.lm_head(hidden)
