"""Floating-point operations of training, counted from the architecture and the attention strategy."""

from collections.abc import Sequence

from muse_lightning.attention.base import AttentionStrategy
from muse_lightning.model.llama import Llama


def matrix_parameters(llama: Llama) -> int:
    """Weights that every token is multiplied with: all matrices but the embedding, which is a look-up."""
    matrices = sum(p.numel() for p in llama.parameters() if p.ndim == 2)
    is_tied = llama.lm_head.weight is llama.model.embed_tokens.weight
    return matrices if is_tied else matrices - llama.model.embed_tokens.weight.numel()


def training_flops_per_token(
    llama: Llama,
    lengths: Sequence[int],
    attention: Sequence[AttentionStrategy] | None = None,
    *,
    has_documents: bool = False,
) -> float:
    """FLOPs of the forward and backward pass, per token, nothing recomputed.

    A weight costs 2 FLOPs in the forward pass and 4 in the backward pass; what attention costs is
    `attention_flops_per_token`. Norms, softmax and rotary embedding are not counted.

    Args:
        llama: the model, on any device.
        lengths: tokens of the documents that are attended separately; one number for a context of one document.
        has_documents: the documents are packed, attention is told by `cu_seqlens`.
        attention: strategies to count instead of the layers' own; their number need not be that of the layers.
    Source: PaLM (arXiv 2204.02311), appendix B, with pairs counted instead of assumed to be N^2.
    """
    of_attention = attention_flops_per_token(llama, lengths, attention, has_documents=has_documents)
    return 6 * matrix_parameters(llama) + of_attention


def attention_flops_per_token(
    llama: Llama,
    lengths: Sequence[int],
    attention: Sequence[AttentionStrategy] | None = None,
    *,
    has_documents: bool = False,
) -> float:
    """Attention's part of `training_flops_per_token`: the products of queries with keys, and of weights with values.

    A query-key pair of one head costs 4 * head_dim FLOPs in the forward pass and twice that in the backward pass.

    Args:
        llama, lengths, attention, has_documents: as for `training_flops_per_token`.
    """
    config = llama.config
    strategies = attention or [block.self_attn.attention for block in llama.blocks]
    pairs = sum(strategy.pairs(lengths, has_documents=has_documents) for strategy in strategies)
    pairs *= len(llama.blocks) / len(strategies)
    return 12 * config.attention_head_dim * config.num_attention_heads * pairs / sum(lengths)
