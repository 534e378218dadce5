"""Exact softmax attention: the twin that every other strategy is compared with."""

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from muse_lightning.attention.base import AttentionStrategy
from muse_lightning.attention.packed import attend_documents, has_varlen_kernel, varlen_attention

# In order of measured speed on an H100 (docs/attention.md): PyTorch's own order tries FlashAttention-2 before cuDNN.
_KERNELS_BY_SPEED = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


def sdpa(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float) -> Tensor:
    """Causal scaled_dot_product_attention by the fastest kernel that takes these tensors, every row one document.

    Not cuDNN's under `torch.use_deterministic_algorithms`, which its backward pass does not obey.
    """
    kernels = _KERNELS_BY_SPEED[1:] if torch.are_deterministic_algorithms_enabled() else _KERNELS_BY_SPEED
    with sdpa_kernel(kernels, set_priority=True):
        return F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=softmax_scale, enable_gqa=q.shape[1] != k.shape[1]
        )


class Dense(AttentionStrategy):
    """Exact causal attention by the best kernel of the machine; never a mask tensor.

    Documents are attended by PyTorch's variable-length kernel on a GPU in half precision (head_dim a multiple of 8),
    else one after the other.
    """

    heads_are_alike = True

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, softmax_scale: float, cu_seqlens: Tensor | None = None
    ) -> Tensor:
        if cu_seqlens is None:
            return sdpa(q, k, v, softmax_scale)
        if has_varlen_kernel(q):
            return varlen_attention(q, k, v, cu_seqlens, softmax_scale)
        return attend_documents(partial(sdpa, softmax_scale=softmax_scale), q, k, v, cu_seqlens)

    def pairs(self, lengths: Sequence[int], *, has_documents: bool = False) -> float:
        return float(sum(length * (length + 1) // 2 for length in lengths))
