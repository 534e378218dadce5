"""What `muse_attention` accepts, and what of it the kernels can do."""

import importlib.util
import os

import torch
from torch import Tensor

from muse_kernels.attention.chunks import num_rows
from muse_kernels.attention.options import Implementation, ResolvedOptions
from muse_kernels.attention.reference import MuseClusters

HAS_TRITON = importlib.util.find_spec("triton") is not None
if HAS_TRITON:
    from muse_kernels.attention import tiles

KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
KERNEL_QUERY_CLUSTERS = (16, 32, 64, 128)
KERNEL_KEY_CLUSTERS = (16, 32, 64)
MAX_KEY_CLUSTERS_PER_SUMMARY = 32
MAX_CANDIDATES = 64
MAX_CHUNK = 8192
MAX_HEAD_DIM = 256
MAX_RUNS = 65_535
"""Programs on the second axis of a launch."""
SHORTEST_RUN = 8
"""Key clusters that a program of `muse_scores` and `muse_summaries` goes through at least, by `tiles.py`."""


def implementation_of(q: Tensor, options: ResolvedOptions, cu_seqlens: Tensor | None) -> Implementation:
    """The implementation that "auto" stands for.

    Raises ValueError for "triton" where kernels cannot do what is asked.
    """
    if options.implementation == "reference":
        return "reference"
    obstacle = obstacle_to_kernels(q, options, cu_seqlens)
    if options.implementation == "triton" and obstacle is not None:
        raise ValueError(f'implementation="triton" {obstacle}')
    return "reference" if obstacle is not None else "triton"


def obstacle_to_kernels(q: Tensor, options: ResolvedOptions, cu_seqlens: Tensor | None) -> str | None:
    """Why the kernels cannot be used, None if they can."""
    if not HAS_TRITON:
        return "needs the package triton, which is not installed"
    if q.device.type != "cuda":
        if options.implementation == "auto" or q.device.type != "cpu":
            return f"needs a CUDA device, got {q.device}"
        if os.environ.get("TRITON_INTERPRET") != "1":
            return "needs a CUDA device (or TRITON_INTERPRET=1, to interpret kernels slowly on a CPU), got cpu"
    if q.dtype not in KERNEL_DTYPES:
        return f"accepts float32, float16 and bfloat16, got {q.dtype}"
    if not 1 <= q.shape[-1] <= MAX_HEAD_DIM:
        return f"accepts head_dim up to {MAX_HEAD_DIM}, got {q.shape[-1]}"
    for name, accepted in (("query_cluster", KERNEL_QUERY_CLUSTERS), ("key_cluster", KERNEL_KEY_CLUSTERS)):
        size = getattr(options, name)
        if size not in accepted:
            return f"accepts {name} {', '.join(map(str, accepted))}, got {size}"
    if options.chunk > MAX_CHUNK:
        return f"accepts chunk up to {MAX_CHUNK}, got {options.chunk}"
    rows = num_rows(q.shape[2], None if cu_seqlens is None else cu_seqlens.shape[0] - 1, options)
    places, most_places = rows * options.chunk, _most_places(q.shape[-1], options)
    if places > most_places:
        return f"accepts up to {most_places} places of chunks with head_dim {q.shape[-1]}, got {places}"
    if options.key_clusters_per_summary > MAX_KEY_CLUSTERS_PER_SUMMARY:
        most = f"{MAX_KEY_CLUSTERS_PER_SUMMARY * options.key_cluster} with key_cluster {options.key_cluster}"
        return f"accepts summary_cluster up to {most}, got {options.summary_cluster}"
    if options.candidates > MAX_CANDIDATES:
        return f"accepts candidates up to {MAX_CANDIDATES}, got {options.candidates}"
    if not tiles.fits(q):
        return f"needs more memory than this GPU gives one block for head_dim {q.shape[-1]} in {q.dtype}"
    return None


def _most_places(head_dim: int, options: ResolvedOptions) -> int:
    """Tokens that the chunks of one head may hold: kernels count its elements in 32 bits, and its runs on an axis."""
    padded = max(16, 1 << (head_dim - 1).bit_length())
    return min((2**31 - 1) // padded, MAX_RUNS * SHORTEST_RUN * options.key_cluster)


def check_tensors(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> None:
    """Raises ValueError for shapes, dtypes or devices that `muse_attention` does not accept."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4:
            raise ValueError(f"{name} must be [batch, heads, tokens, head_dim], got shape {list(x.shape)}")
        if x.dtype != q.dtype or x.device != q.device or not x.is_floating_point():
            raise ValueError(
                f"q, k and v must share one floating-point dtype and one device, "
                f"got q {q.dtype} on {q.device}, {name} {x.dtype} on {x.device}"
            )
    if k.shape != v.shape:
        raise ValueError(f"k and v must have the same shape, got {list(k.shape)} and {list(v.shape)}")
    if (q.shape[0], *q.shape[2:]) != (k.shape[0], *k.shape[2:]):
        raise ValueError(f"q and k must agree in all but heads, got {list(q.shape)} and {list(k.shape)}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"heads of q must be a multiple of heads of k, got {q.shape[1]} and {k.shape[1]}")
    if cu_seqlens is not None:
        _check_cu_seqlens(cu_seqlens, q)


def _check_cu_seqlens(cu_seqlens: Tensor, q: Tensor) -> None:
    if q.shape[0] != 1:
        raise ValueError(f"with cu_seqlens the batch must be 1 (flatten it), got {q.shape[0]}")
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
        raise ValueError(f"cu_seqlens must be int32 [S + 1], got {cu_seqlens.dtype} {list(cu_seqlens.shape)}")
    if cu_seqlens.device != q.device:
        raise ValueError(f"cu_seqlens must be on the device of q, {q.device}, got {cu_seqlens.device}")
    if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
        starts_and_ends = (int(cu_seqlens[0]), int(cu_seqlens[-1]))
        if starts_and_ends != (0, q.shape[2]) or bool((cu_seqlens.diff() < 0).any()):
            raise ValueError(
                f"cu_seqlens must rise from 0 to the number of tokens, {q.shape[2]}, got {cu_seqlens.tolist()[:8]} "
                f"... {starts_and_ends[1]}"
            )


def check_clusters(
    clusters: MuseClusters, q: Tensor, k: Tensor, cu_seqlens: Tensor | None, options: ResolvedOptions
) -> None:
    """Raises ValueError for clusters that are not of these inputs."""
    for name, x, (shape, dtype) in zip(
        MuseClusters._fields, clusters, cluster_shapes(q, k, cu_seqlens, options), strict=True
    ):
        if list(x.shape) != list(shape) or x.dtype != dtype or x.device != q.device:
            raise ValueError(
                f"clusters.{name} must be {dtype} {list(shape)} on {q.device}, "
                f"got {x.dtype} {list(x.shape)} on {x.device}"
            )


def statistics_dtype(q: Tensor) -> torch.dtype:
    """Of the lse and of mu."""
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def cluster_shapes(
    q: Tensor, k: Tensor, cu_seqlens: Tensor | None, options: ResolvedOptions
) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of each field of MuseClusters; static, whatever the documents' lengths."""
    batch, num_heads, num_tokens, head_dim = q.shape
    chunk = options.chunk
    rows = num_rows(num_tokens, None if cu_seqlens is None else cu_seqlens.shape[0] - 1, options)
    return [
        ((batch, num_heads, rows, chunk), torch.int32),
        ((batch, k.shape[1], rows, chunk), torch.int32),
        ((batch, num_heads, rows, options.query_clusters, head_dim), statistics_dtype(q)),
        ((batch, num_heads, rows, options.query_clusters, options.top_k), torch.int32),
    ]
