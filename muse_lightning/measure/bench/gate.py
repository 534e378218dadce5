"""The gate before any timing: MuSe attention, as it will be timed, against its definition in plain PyTorch.

Small inputs of every kind that is timed. With clusters held, output and gradients may be at most ERROR_MULTIPLE times
as far from the float32 reference as the reference itself gets when its inputs and results are rounded to the working
dtype. With clusters of its own, the result may be at most QUALITY_MULTIPLE times as far from exact attention as the
reference's: that holds clustering and selection to account.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import cast

import torch
from torch import Tensor

from muse_kernels import MuseClusters, muse_attention, muse_clusters
from muse_kernels.attention.options import MuseOptions
from muse_lightning.measure.attention_error import relative_squared_error
from muse_lightning.measure.bench.inputs import Heads, cumulative_lengths

ERROR_MULTIPLE = 3.0
"""A kernel rounds in another order, and probabilities and summaries besides, up to twice as much as its inputs."""
QUALITY_MULTIPLE = 1.25
"""Projections that nearly tie may fall on either side of a median, and then clusters differ without being worse."""
SMALL_CHUNK, SMALL_CLUSTER, SMALL_TOP_K, SMALL_CANDIDATES = 64, 16, 2, 5
"""Sizes where there is no GPU: Triton's interpreter is slow."""
NAMES = ("out", "dq", "dk", "dv")


@dataclass(frozen=True)
class Check:
    """One comparison: what was compared, how far off it was, and how far it may be."""

    case: str
    name: str
    error: float
    limit: float

    @property
    def is_passed(self) -> bool:
        """NaN does not pass."""
        return self.error <= self.limit

    def __str__(self) -> str:
        return f"{self.case}: {self.name} error {self.error:.3g}, accepted up to {self.limit:.3g}"


def run_gate(options: MuseOptions, heads: Heads, *, has_documents: bool, device: str) -> list[Check]:
    """Compare attention with these options with the reference.

    Args:
        options: as they will be timed; on a CPU with the small sizes above.
        heads: as they will be timed; the number of key heads is reduced to two.
        has_documents: also check packed documents, one of them exact.
        device: where attention runs; the reference runs there too.
    Raises:
        ValueError: the implementation does not take these options on this device.
    """
    if device == "cpu":
        options = replace(
            options,
            chunk=SMALL_CHUNK,
            query_cluster=SMALL_CLUSTER,
            key_cluster=SMALL_CLUSTER,
            top_k=min(options.top_k, SMALL_TOP_K),
            candidates=min(options.candidates, SMALL_CANDIDATES),
        )
    checks: list[Check] = []
    chunk = options.chunk
    cases: list[tuple[str, list[int]]] = [("one document", [3 * chunk + chunk // 2 + 3])]
    if has_documents:
        cases.append(("packed documents", [chunk // 2, 2 * chunk + 3, chunk]))
    for case, lengths in cases:
        exact_below = 0 if len(lengths) == 1 else chunk // 2
        each = replace(options, exact_below=exact_below)
        checks += [
            Check(case, name, error, limit) for name, error, limit in _compare(each, _few(heads), lengths, device)
        ]
    return checks


def _few(heads: Heads) -> Heads:
    num_kv_heads = min(heads.num_kv_heads, 2)
    return replace(heads, num_heads=heads.num_heads // heads.num_kv_heads * num_kv_heads, num_kv_heads=num_kv_heads)


def _compare(options: MuseOptions, heads: Heads, lengths: list[int], device: str) -> Iterator[tuple[str, float, float]]:
    """Name, error and limit of each comparison."""
    inputs = _structured_inputs(sum(lengths), heads, device)
    cu_seqlens = None if len(lengths) == 1 else cumulative_lengths(lengths).to(device)
    rounded = [x.to(heads.dtype) for x in inputs]
    reference = replace(options, implementation="reference")
    clusters = muse_clusters(*rounded[:2], cu_seqlens=cu_seqlens, **asdict(reference))

    exact = _results(inputs, reference, cu_seqlens, clusters)
    baseline = _results([x.float() for x in rounded], reference, cu_seqlens, clusters)
    actual = _results(rounded, options, cu_seqlens, clusters)
    for name, found, rough, true in zip(NAMES, actual, baseline, exact, strict=True):
        error, allowed = (found.float() - true).abs(), (rough.to(heads.dtype).float() - true).abs()
        for kind, statistic in (("largest", torch.max), ("mean", _root_mean_square)):
            # One rounding of the result, which even a perfect one needs.
            rounding = torch.finfo(heads.dtype).eps / 2 * statistic(true.abs())
            limit = (ERROR_MULTIPLE * statistic(allowed) + rounding).item()
            yield f"{name} ({kind})", statistic(error).item(), limit

    dense = replace(reference, exact_below=sum(lengths))
    true = _results(inputs, dense, cu_seqlens, None)[0]
    own, best = (_results(rounded, each, cu_seqlens, None)[0] for each in (options, reference))
    limit = QUALITY_MULTIPLE * relative_squared_error(best, true).item() + torch.finfo(heads.dtype).eps ** 2
    yield "own clusters: relative squared", relative_squared_error(own, true).item(), limit


def _structured_inputs(num_tokens: int, heads: Heads, device: str) -> list[Tensor]:
    """q, k, v and dout, float32: q and k around a few directions each, so that clusters and selection matter."""
    generator = torch.Generator().manual_seed(0)

    def normal(count: int, rows: int) -> Tensor:
        return torch.randn(1, count, rows, heads.head_dim, generator=generator)

    topics = normal(heads.num_kv_heads, 12)
    of_token = torch.randint(12, (num_tokens,), generator=generator)
    q, k, v, dout = (
        normal(count, num_tokens)
        for count in (heads.num_heads, heads.num_kv_heads, heads.num_kv_heads, heads.num_heads)
    )
    k = (k + 2 * topics[:, :, of_token]) / 2
    q = (q + 2 * topics.repeat_interleave(heads.num_heads // heads.num_kv_heads, dim=1)[:, :, of_token.flip(0)]) / 2
    return [x.to(device) for x in (q, k, v, dout)]


def _results(
    inputs: list[Tensor], options: MuseOptions, cu_seqlens: Tensor | None, clusters: MuseClusters | None
) -> list[Tensor]:
    """Output and gradients of q, k and v."""
    *qkv, dout = inputs
    leaves = [x.detach().requires_grad_() for x in qkv]
    out = cast(Tensor, muse_attention(*leaves, cu_seqlens=cu_seqlens, clusters=clusters, **asdict(options)))
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


def _root_mean_square(error: Tensor) -> Tensor:
    return error.square().mean().sqrt()
