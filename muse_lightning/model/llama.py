"""The Llama decoder as one device sees it: what a layer does with q, k, v is the attention strategy's affair.

Parameter names are Hugging Face's. Letters: B batch, N tokens, H heads, D head size.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from muse_lightning.attention.base import AttentionStrategy
from muse_lightning.model.assign import assign
from muse_lightning.model.config import LlamaConfig
from muse_lightning.model.rope import apply_rotary, document_positions, rotation

AttentionFactory = Callable[[int], AttentionStrategy]


class RMSNorm(nn.RMSNorm):
    """RMSNorm in the dtype of its weight, float32 in mixed precision, that gives back the dtype of its input."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype)).to(x.dtype)


class SelfAttention(nn.Module):
    """Projections and rotary embedding around an attention strategy."""

    def __init__(self, config: LlamaConfig, attention: AttentionStrategy):
        super().__init__()
        self.head_dim = config.attention_head_dim
        query_size = config.num_attention_heads * self.head_dim
        key_size = config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, key_size, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, key_size, bias=config.attention_bias)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=config.attention_output_bias)
        self.q_norm = RMSNorm(self.head_dim, eps=config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(self.head_dim, eps=config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.attention = attention

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q [B, H, N, D], k and v [B, H_kv, N, D] of x [B, N, hidden_size]; q and k rotated."""
        heads = (*x.shape[:2], -1, self.head_dim)
        q = apply_rotary(self.q_norm(self.q_proj(x).view(heads)).transpose(1, 2), cos, sin)
        k = apply_rotary(self.k_norm(self.k_proj(x).view(heads)).transpose(1, 2), cos, sin)
        return q, k, self.v_proj(x).view(heads).transpose(1, 2)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        """What the strategy makes of them, [B, H, N, D]."""
        return self.attention(q, k, v, softmax_scale=self.head_dim**-0.5, cu_seqlens=cu_seqlens)

    def merge(self, out: Tensor) -> Tensor:
        """All heads' results together, [B, N, hidden_size]."""
        return self.o_proj(out.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """SwiGLU (arXiv 2002.05202)."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """One layer: attention and feed-forward network, each on a normalised input and added to the residual stream."""

    def __init__(self, config: LlamaConfig, attention: AttentionStrategy):
        super().__init__()
        self.self_attn = SelfAttention(config, attention)
        self.mlp = FeedForward(config)
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        q, k, v = self.before_attention(x, cos, sin)
        return self.after_attention(x, self.self_attn.attend(q, k, v, cu_seqlens))

    # Apart, so that parallelize.py can compile what is not attention, compute it again, and run the last over pieces of
    # the tokens.

    def before_attention(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v of the residual stream x."""
        return self.self_attn.project(self.input_layernorm(x), cos, sin)

    def after_attention(self, x: Tensor, out: Tensor) -> Tensor:
        """The residual stream with what attention and the feed-forward network add to it."""
        return self.feed_forward(self.add_attention(x, out))

    def add_attention(self, x: Tensor, out: Tensor) -> Tensor:
        """The residual stream x with attention's result out [B, H, N, D]."""
        return x + self.self_attn.merge(out)

    def feed_forward(self, x: Tensor) -> Tensor:
        """The residual stream x with what the feed-forward network adds, each token by itself."""
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Embedding, blocks, final norm: what Hugging Face calls `model`."""

    def __init__(self, config: LlamaConfig, attention: AttentionFactory):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, attention(layer)) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, input_ids: Tensor, cos: Tensor, sin: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        x = self.embed_tokens(input_ids)
        for layer in self.layers:
            x = layer(x, cos, sin, cu_seqlens)
        return self.norm(x)


class Llama(nn.Module):
    """A Llama-family language model.

    Building it under `torch.device("meta")` costs nothing; `to_empty(device=...)` and `init_weights()` make it real.

    Args:
        config: the architecture.
        attention: makes the attention strategy of a layer from the layer's index.
    """

    def __init__(self, config: LlamaConfig, attention: AttentionFactory):
        super().__init__()
        self.config = config
        self.model = Decoder(config, attention)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self._tie_weights()

    @property
    def blocks(self) -> list[Block]:
        """The layers, typed."""
        return cast(list[Block], list(self.model.layers))

    def hidden_states(
        self, input_ids: Tensor, *, cu_seqlens: Tensor | None = None, position_ids: Tensor | None = None
    ) -> Tensor:
        """Final states, which the head turns into logits.

        Args:
            input_ids: int64 [B, N].
            cu_seqlens: int32 [S + 1], offsets of documents in the flattened batch, row starts included, padded by
                repeating B * N. No token attends outside its document. None: each row is one document.
            position_ids: int64 [B, N]. None: positions within the document.
        Returns:
            [B, N, hidden_size], after the final norm.
        """
        if position_ids is None:
            position_ids = (
                torch.arange(input_ids.shape[1], device=input_ids.device)[None]
                if cu_seqlens is None
                else document_positions(cu_seqlens, *input_ids.shape)
            )
        cos, sin = rotation(self.config, position_ids)
        return self.model(input_ids, cos, sin, cu_seqlens)

    def forward(
        self, input_ids: Tensor, *, cu_seqlens: Tensor | None = None, position_ids: Tensor | None = None
    ) -> Tensor:
        """Logits [B, N, vocab_size]; arguments as for `hidden_states`. Training never calls this (training/loss.py)."""
        return self.lm_head(self.hidden_states(input_ids, cu_seqlens=cu_seqlens, position_ids=position_ids))

    def set_attention(self, attention: AttentionFactory) -> None:
        """Replace the attention strategy of every layer. Parameters and state dict stay the same."""
        for layer, block in enumerate(self.blocks):
            block.self_attn.attention = attention(layer).train(self.training)

    @contextmanager
    def attention_as(self, attention: AttentionFactory) -> Iterator[None]:
        """Use another attention strategy inside a `with` block."""
        before = [block.self_attn.attention for block in self.blocks]
        self.set_attention(attention)
        try:
            yield
        finally:
            for block, strategy in zip(self.blocks, before, strict=True):
                block.self_attn.attention = strategy

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Initialise every parameter in place, one after the other; the same values whether or not they are sharded.

        Matrices are normal with standard deviation `config.initializer_range`; the two projections of each block that
        write to the residual stream are divided by sqrt(2 * num_hidden_layers), so that the stream's variance does not
        grow with depth. Norms are 1, biases 0.

        Args:
            generator: source of randomness on the parameters' device; None: torch's global one.
        Source: GPT-2 (Radford et al. 2019, section 2.3).
        """
        residual = (2 * self.config.num_hidden_layers) ** -0.5
        for name, parameter in self.named_parameters():
            whole = torch.empty(parameter.shape, dtype=parameter.dtype, device=parameter.device)
            if parameter.ndim == 1:
                assign(parameter, whole.fill_(0.0 if name.endswith(".bias") else 1.0))
                continue
            writes_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            std = self.config.initializer_range * (residual if writes_residual else 1.0)
            assign(parameter, whole.normal_(0.0, std, generator=generator))

    def _tie_weights(self) -> None:
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # Leaving the meta device makes a new parameter per module, which would untie the head.
        result = super()._apply(fn, recurse)
        self._tie_weights()
        return result
