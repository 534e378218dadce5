"""Rotary position embedding: positions within documents, wavelengths and their scaling, the rotation itself.

Letters: B batch, N tokens, D head size.
"""

import math

import torch
from torch import Tensor

from muse_lightning.model.config import LlamaConfig, RopeScaling


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

    Source: RoFormer (arXiv 2104.09864); the scalings are those that Hugging Face calls by the same `rope_type`.
    """
    head_dim = config.attention_head_dim
    exponent = torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim
    angles = config.rope_theta**-exponent
    scaling = config.rope_scaling
    if scaling is None:
        return angles
    stretched = angles / scaling.factor
    if scaling.rope_type == "linear":
        return stretched
    assert scaling.original_max_position_embeddings is not None
    if scaling.rope_type == "yarn":
        keep = 1 - _yarn_ramp(scaling, scaling.original_max_position_embeddings, config).to(angles.device)
    else:
        # Full turns over the original context: few turns means a long wavelength, which is stretched.
        turns = scaling.original_max_position_embeddings * angles / (2 * math.pi)
        keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        keep = keep.clamp(0, 1)
    return keep * angles + (1 - keep) * stretched


def _yarn_ramp(scaling: RopeScaling, original_length: int, config: LlamaConfig) -> Tensor:
    """Share of the stretched wavelength in each pair, float32 [D / 2]: 0 for fast pairs, 1 for slow ones.

    Source: YaRN (arXiv 2309.00071), section 3.2; as in the authors' code, the ramp is linear in the index of the pair.
    """
    head_dim = config.attention_head_dim

    def pair(turns: float) -> float:
        """The pair, not a whole number, that makes so many turns over the original context."""
        return head_dim * math.log(original_length / (2 * math.pi * turns)) / (2 * math.log(config.rope_theta))

    first, last = pair(scaling.beta_fast), pair(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    if first == last:
        last += 0.001
    return ((torch.arange(head_dim // 2, dtype=torch.float32) - first) / (last - first)).clamp(0, 1)


def rotation(config: LlamaConfig, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every token's rotation, computed once per forward pass for all layers.

    Args:
        position_ids: int64 [B, N].
    Returns:
        cos, sin: float32 [B, 1, N, D / 2], whatever the precision of the model: positions past a few hundred are not
        told apart in bf16. With YaRN both are multiplied by its attention factor.
    """
    angles = position_ids[:, None, :, None].float() * inverse_wavelengths(config, position_ids.device)
    factor = 1.0 if config.rope_scaling is None else config.rope_scaling.rotation_factor
    return angles.cos() * factor, angles.sin() * factor


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (x[i], x[i + D / 2]), in float32 at least.

    Args:
        x: [B, H, N, D].
        cos, sin: float32 [B, 1, N, D / 2], from `rotation`.
    Returns:
        [B, H, N, D] in the dtype of x.
    """
    first, second = x.chunk(2, dim=-1)
    # Rounded before they are joined: twice the bytes are never joined, and not even written where this is compiled.
    return torch.cat(((first * cos - second * sin).to(x.dtype), (second * cos + first * sin).to(x.dtype)), dim=-1)
