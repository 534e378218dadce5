"""AttentionStrategy: the contract between a layer, which owns the projections, and what it does with q, k and v."""

import inspect
from collections.abc import Sequence

from torch import Tensor, nn

from muse_lightning.errors import UserError

_TO_WRITE = {
    "forward": "write forward(self, q, k, v, *, softmax_scale, cu_seqlens=None), which returns a tensor of the shape "
    "of q",
    "pairs": "write pairs(self, lengths, *, has_documents=False), which returns the query-key pairs per head for "
    "documents of these lengths, sum(n * (n + 1) / 2 for n in lengths) for exact attention",
}
"""What a strategy cannot do without."""


class AttentionStrategy(nn.Module):
    """How a layer attends. No parameters and no buffers, so that every strategy has the same state dict.

    Derive from it, name the class by its path in a recipe (`model.attention`), and it is used: there is no registry.

    Args:
        layer_idx: number of the layer, from 0, for strategies that differ by layer.
    """

    heads_are_alike = False
    """Whether every key-value head, with its query heads, is attended as it would be without the others: then some may
    be left to exact attention (`model.exact_heads`), and `forward` is given fewer heads than the model has."""

    def __init__(self, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, softmax_scale: float, cu_seqlens: Tensor | None = None
    ) -> Tensor:
        """Causal attention.

        Args:
            q: [B, H, N, D]. k, v: [B, H_kv, N, D], H a multiple of H_kv; any strides.
            softmax_scale: factor of q . k.
            cu_seqlens: int32 [S + 1] over the flattened B * N tokens, row starts included, padded by repeating the end:
                tokens of different documents do not see each other. None: every row is one document.
        Returns:
            [B, H, N, D].
        """
        raise _unwritten(self, "forward")

    def check(self, *, seq_len: int, num_heads: int, num_kv_heads: int, head_dim: int) -> None:
        """Called at set-up with the sizes that will be used.

        Raises:
            UserError: the strategy cannot work with these sizes. What is allowed but surprising is a warning.
        """
        if num_heads % num_kv_heads:
            raise UserError(
                f"num_attention_heads must be a multiple of num_key_value_heads, got {num_heads} and {num_kv_heads}"
            )

    def pairs(self, lengths: Sequence[int], *, has_documents: bool = False) -> float:
        """A third of the query-key pairs per head that a training step works on, for documents of these lengths.

        A pair is one product with a key and one with a value, 4 * head_dim FLOPs. The backward pass of attention costs
        twice its forward pass, so this is the number of pairs of the forward pass, but for work that has no backward
        pass, which counts a third.

        Args:
            has_documents: the documents are packed, `cu_seqlens` is given; else each is a row.
        """
        raise _unwritten(self, "pairs")

    def extra_repr(self) -> str:
        """The arguments kept under their own names, for `print` and `muse info`. Override it to show others."""
        names = inspect.signature(type(self)).parameters
        return ", ".join(f"{name}={vars(self)[name]}" for name in names if name != "layer_idx" and name in vars(self))


def check_is_whole(strategy: AttentionStrategy) -> None:
    """Refuse a strategy without a method that every strategy has of its own: before anything is prepared for it.

    Raises:
        UserError: says what to write.
    """
    for method in _TO_WRITE:
        if getattr(getattr(strategy, method), "__func__", None) is getattr(AttentionStrategy, method):
            raise _unwritten(strategy, method)


def _unwritten(strategy: AttentionStrategy, method: str) -> UserError:
    cls = type(strategy)
    return UserError(f"{cls.__module__}.{cls.__qualname__} has no {method}(): {_TO_WRITE[method]}")
