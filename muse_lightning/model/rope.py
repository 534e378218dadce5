"""Rotary position embedding: positions within documents, wavelengths with Llama 3.1's scaling, the rotation itself.

Letters: B batch, N tokens, D head size.
"""

import math

import torch
from torch import Tensor

from muse_lightning.model.config import LlamaConfig


def document_positions(cu_seqlens: Tensor, batch_size: int, seq_len: int) -> Tensor:
    """Position of every token in its document.

    Args:
        cu_seqlens: int32 [S + 1], offsets of documents in the flattened batch. Row starts are among them, so that no
            document reaches into the next row; repeated values (empty documents, padding by the end) are allowed.
        batch_size, seq_len: shape of the batch.
    Returns:
        int64 [B, N], on the device of cu_seqlens: 0 at each document's first token in the batch.
    """
    index = torch.arange(batch_size * seq_len, device=cu_seqlens.device, dtype=torch.int32)
    document = torch.searchsorted(cu_seqlens, index, right=True) - 1
    return (index - cu_seqlens[document]).long().view(batch_size, seq_len)


def inverse_wavelengths(config: LlamaConfig, device: torch.device | str | None = None) -> Tensor:
    """Angle per position of each rotated pair, float32 [D / 2].

    Source: RoFormer (arXiv 2104.09864); the scaling is that of Llama 3.1 (arXiv 2407.21783), as in Meta's
    `apply_scaling` and Hugging Face's `rope_type: llama3`.
    """
    head_dim = config.attention_head_dim
    exponent = torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim
    angles = config.rope_theta**-exponent
    scaling = config.rope_scaling
    if scaling is None:
        return angles
    # Full turns over the original context: few turns means a long wavelength, which is stretched.
    turns = scaling.original_max_position_embeddings * angles / (2 * math.pi)
    keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = keep.clamp(0, 1)
    return keep * angles + (1 - keep) * angles / scaling.factor


def rotation(config: LlamaConfig, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every token's rotation, computed once per forward pass for all layers.

    Args:
        position_ids: int64 [B, N].
    Returns:
        cos, sin: float32 [B, 1, N, D / 2], whatever the precision of the model: positions past a few hundred are not
        told apart in bf16.
    """
    angles = position_ids[:, None, :, None].float() * inverse_wavelengths(config, position_ids.device)
    return angles.cos(), angles.sin()


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (x[i], x[i + D / 2]), in float32 at least.

    Args:
        x: [B, H, N, D].
        cos, sin: float32 [B, 1, N, D / 2], from `rotation`.
    Returns:
        [B, H, N, D] in the dtype of x.
    """
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
