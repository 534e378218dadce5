"""q, k and v that attention is timed on: random, or recorded from a trained model."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, cycle
from pathlib import Path

import torch
from torch import Tensor

from muse_lightning.errors import UserError

QKV = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Heads:
    """Sizes of q, k and v apart from the length."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype

    @property
    def sizes(self) -> dict[str, int]:
        """As `muse_work` takes them."""
        return {
            "num_heads": self.num_heads,
            "num_kv_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "element_size": self.dtype.itemsize,
        }


def random_inputs(num_tokens: int, heads: Heads, device: str, seed: int = 0) -> QKV:
    """Independent normal q [1, H, N, D], k and v [1, H_kv, N, D]."""
    generator = torch.Generator(device).manual_seed(seed)
    q, k, v = (
        torch.randn(1, count, num_tokens, heads.head_dim, device=device, dtype=heads.dtype, generator=generator)
        for count in (heads.num_heads, heads.num_kv_heads, heads.num_kv_heads)
    )
    return q, k, v


def load_recorded(paths: Sequence[Path]) -> dict[str, Tensor]:
    """The heads in files written by torch.save, each [3, N, D]: q after RoPE and before scaling, k after RoPE, v.

    Returns:
        The file's name without its ending -> the tensor, on the CPU.
    Raises:
        UserError: a file is missing or holds something else, or head sizes differ.
    """
    heads: dict[str, Tensor] = {}
    for path in paths:
        try:
            qkv = torch.load(path, weights_only=True, map_location="cpu")
        except Exception as error:
            raise UserError(f"recorded: cannot read {path}: {' '.join(str(error).split())[:200]}") from None
        if not isinstance(qkv, Tensor) or qkv.dim() != 3 or qkv.shape[0] != 3 or not qkv.is_floating_point():
            found = f"{qkv.dtype} {list(qkv.shape)}" if isinstance(qkv, Tensor) else type(qkv).__name__
            raise UserError(f"recorded: {path} holds {found}, expected a floating-point tensor [3, N, D]")
        heads[path.stem] = qkv
    if len(heads) != len(paths):
        raise UserError(f"recorded: file names must differ, got {', '.join(path.name for path in paths)}")
    sizes = {qkv.shape[-1] for qkv in heads.values()}
    if len(sizes) > 1:
        raise UserError(f"recorded: the files must have one head size, got {', '.join(map(str, sorted(sizes)))}")
    return heads


def recorded_inputs(recorded: Sequence[Tensor], num_tokens: int, heads: Heads, device: str) -> QKV:
    """q [1, H, N, D], k and v [1, H_kv, N, D] made of recorded heads [3, n, d]; D a multiple of d.

    A recording is repeated up to the length. Heads that come from the same one are rolled along it by different
    distances; query heads of one key head by a little more. With D > d a head is several recorded ones side by side.
    """
    pieces = heads.head_dim // recorded[0].shape[-1]
    per_kv_head = heads.num_heads // heads.num_kv_heads

    def head(part: int, kv_head: int, shift: int) -> Tensor:
        columns = []
        for number in range(kv_head * pieces, (kv_head + 1) * pieces):
            source = recorded[number % len(recorded)][part].to(device, heads.dtype)
            first = 1009 * (number // len(recorded)) + shift
            columns.append(source[(torch.arange(num_tokens, device=device) + first) % source.shape[0]])
        return torch.cat(columns, dim=-1)

    q = torch.stack([head(0, index // per_kv_head, index % per_kv_head) for index in range(heads.num_heads)])
    k, v = (torch.stack([head(part, index, 0) for index in range(heads.num_kv_heads)]) for part in (1, 2))
    return q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0)


def packed_lengths(documents: Sequence[int], num_tokens: int) -> list[int]:
    """Lengths of documents that fill `num_tokens`: those given, over and over, the last one cut."""
    lengths: list[int] = []
    for length in cycle(documents):
        remaining = num_tokens - sum(lengths)
        if remaining <= length:
            return [*lengths, remaining]
        lengths.append(length)
    raise ValueError("documents must not be empty")


def cumulative_lengths(lengths: Sequence[int]) -> Tensor:
    """int32 [S + 1] on the CPU."""
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
