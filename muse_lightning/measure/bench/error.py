"""How far MuSe attention is from exact attention on recorded heads: output and gradients."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from muse_kernels import muse_attention
from muse_kernels.attention.options import MuseOptions
from muse_lightning.measure.attention_error import relative_squared_error


@dataclass(frozen=True)
class HeadError:
    """Error of one head with one setting."""

    head: str
    num_tokens: int
    top_k: int
    relative_squared_error: float
    cosine_dq: float
    cosine_dk: float
    cosine_dv: float


def head_errors(name: str, qkv: Tensor, options: MuseOptions, dtype: torch.dtype, device: str) -> list[HeadError]:
    """Error of a recorded head [3, N, D] with half, once and twice the retrieved clusters, and with none.

    Exact attention is computed in float32 from the same rounded inputs; MuSe as it is timed. Nothing is exact because
    it is short. The cotangent is random, the same for both.
    """
    rounded = [x[None, None].to(device, dtype) for x in qkv]
    dout = torch.empty_like(rounded[0]).normal_(generator=torch.Generator(device).manual_seed(1))
    scale = options.resolved(qkv.shape[-1]).softmax_scale

    def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=options.causal, scale=scale)

    true = _results(exact, [x.float() for x in rounded], dout.float())
    errors = []
    for top_k in sorted({0, options.top_k // 2, options.top_k, 2 * options.top_k}):
        setting = asdict(replace(options, top_k=top_k, exact_below=0))

        def approximate(*inputs: Tensor, setting: dict[str, object] = setting) -> Tensor:
            return cast(Tensor, muse_attention(*inputs, **setting))  # type: ignore[arg-type]

        found = _results(approximate, rounded, dout)
        cosines = (
            F.cosine_similarity(x.float().flatten(), y.flatten(), dim=0).item()
            for x, y in zip(found[1:], true[1:], strict=True)
        )
        error = relative_squared_error(found[0], true[0]).item()
        errors.append(HeadError(name, qkv.shape[1], top_k, error, *cosines))
    return errors


def _results(attend: Callable[..., Tensor], inputs: list[Tensor], dout: Tensor) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = attend(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]
