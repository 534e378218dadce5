"""What is timed: MuSe attention, and what else one could use in its place. A peer is its library's best call."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from muse_kernels import muse_attention
from muse_kernels.attention.options import MuseOptions
from muse_lightning.attention.packed import attend_documents, varlen_attention
from muse_lightning.measure.bench.inputs import QKV

Peer = Literal["cudnn", "flash", "flex", "nsa", "reference"]
LABELS = {
    "muse": "MuSe",
    "cudnn": "cuDNN",
    "flash": "FlashAttention",
    "flex": "FlexAttention, same density",
    "nsa": "NSA (fla)",
    "reference": "MuSe, plain PyTorch",
}
FLEX_BLOCK = 128
NSA_GROUP = 16
"""Query heads per key head that NSA's kernels need at least."""

Attend = Callable[..., Tensor]


@dataclass(frozen=True)
class Problem:
    """One thing to compute: q, k and v, documents, and MuSe's options for it."""

    qkv: QKV
    options: MuseOptions
    cu_seqlens: Tensor | None = None
    """int32 [S + 1] on the CPU."""

    @property
    def num_tokens(self) -> int:
        """Tokens of the row."""
        return self.qkv[0].shape[2]

    @property
    def softmax_scale(self) -> float:
        """Factor of q . k."""
        return self.options.resolved(self.qkv[0].shape[-1]).softmax_scale


class UnavailableError(Exception):
    """A peer cannot compute this problem; the message is the reason, a few words."""


class Variant:
    """One way to compute a problem, with inputs and cotangent of its own layout.

    Args:
        name: a key of LABELS.
        attend: maps the inputs to the output.
        inputs: what gradients are taken of; made leaves here.
    """

    def __init__(self, name: str, attend: Attend, inputs: tuple[Tensor, ...]) -> None:
        self.name = name
        self.attend = attend
        self.inputs = tuple(x.detach().requires_grad_() for x in inputs)
        # The output has the shape of q, for every variant.
        generator = torch.Generator(inputs[0].device).manual_seed(1)
        self.dout = torch.empty_like(inputs[0]).normal_(generator=generator)

    def forward(self) -> Tensor:
        """The output, with what a backward pass would need."""
        return self.attend(*self.inputs)

    def forward_backward(self) -> tuple[Tensor, ...]:
        """The gradients of q, k, v and of whatever else the variant takes."""
        return torch.autograd.grad(self.forward(), self.inputs, self.dout)


def make_variant(name: str, problem: Problem) -> Variant:
    """Build the variant of this name.

    Raises:
        UnavailableError: it cannot compute the problem, or is not installed.
    """
    return _MAKERS[name](problem)


def _muse(problem: Problem) -> Variant:
    q = problem.qkv[0]
    cu_seqlens = None if problem.cu_seqlens is None else problem.cu_seqlens.to(q.device)
    return Variant("muse", partial(_muse_output, cu_seqlens=cu_seqlens, **asdict(problem.options)), problem.qkv)


def _reference(problem: Problem) -> Variant:
    variant = _muse(replace(problem, options=replace(problem.options, implementation="reference")))
    variant.name = "reference"
    return variant


def _muse_output(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    return cast(Tensor, muse_attention(q, k, v, **options))


def _cudnn(problem: Problem) -> Variant:
    attend = partial(
        _sdpa,
        backend=SDPBackend.CUDNN_ATTENTION,
        is_causal=problem.options.causal,
        scale=problem.softmax_scale,
    )
    if problem.cu_seqlens is None:
        return Variant("cudnn", attend, problem.qkv)
    # PyTorch calls cuDNN for whole rows only: a call for each document.
    return Variant("cudnn", partial(_per_document, attend=attend, cu_seqlens=problem.cu_seqlens), problem.qkv)


def _flash(problem: Problem) -> Variant:
    if problem.cu_seqlens is None:
        attend = partial(
            _sdpa,
            backend=SDPBackend.FLASH_ATTENTION,
            is_causal=problem.options.causal,
            scale=problem.softmax_scale,
        )
        return Variant("flash", attend, problem.qkv)
    if not problem.options.causal:
        raise UnavailableError("documents are attended causally only")
    cu_seqlens = problem.cu_seqlens.to(problem.qkv[0].device)
    return Variant(
        "flash",
        partial(varlen_attention, cu_seqlens=cu_seqlens, softmax_scale=problem.softmax_scale),
        problem.qkv,
    )


def _sdpa(q: Tensor, k: Tensor, v: Tensor, *, backend: SDPBackend, is_causal: bool, scale: float) -> Tensor:
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(
            q, k, v, is_causal=is_causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )


def _per_document(q: Tensor, k: Tensor, v: Tensor, *, attend: Attend, cu_seqlens: Tensor) -> Tensor:
    return attend_documents(attend, q, k, v, cu_seqlens)


def _flex(problem: Problem) -> Variant:
    options = problem.options
    if problem.cu_seqlens is not None:
        raise UnavailableError("timed without documents only")
    if problem.num_tokens % FLEX_BLOCK or options.chunk % FLEX_BLOCK:
        raise UnavailableError(f"needs length and chunk in multiples of {FLEX_BLOCK}")
    mask = same_density_mask(problem.num_tokens, options, problem.qkv[0].device)
    # Compiled anew for every problem: for the exact shape, and never so often that dynamo gives up.
    torch.compiler.reset()
    compiled = torch.compile(flex_attention, dynamic=False)
    is_grouped = problem.qkv[0].shape[1] != problem.qkv[1].shape[1]
    return Variant(
        "flex",
        cast(Attend, partial(compiled, block_mask=mask, scale=problem.softmax_scale, enable_gqa=is_grouped)),
        problem.qkv,
    )


def same_density_mask(num_tokens: int, options: MuseOptions, device: torch.device | str) -> BlockMask:
    """The keys that MuSe attends exactly, as blocks: the own chunk, and for 128 queries as many far keys at random.

    Far keys are top_k * key_cluster in whole blocks of 128 of other chunks (causally, of earlier ones).
    """
    num_blocks, per_chunk = num_tokens // FLEX_BLOCK, options.chunk // FLEX_BLOCK
    block = torch.arange(num_blocks, device=device)
    row, column = block[:, None], block[None]
    is_own = row // per_chunk == column // per_chunk
    is_far = column // per_chunk < row // per_chunk if options.causal else ~is_own
    count = min(options.top_k * options.key_cluster // FLEX_BLOCK, num_blocks)
    generator = torch.Generator(device).manual_seed(2)
    score = torch.rand(num_blocks, num_blocks, device=device, generator=generator).masked_fill(~is_far, -1)
    is_chosen = torch.zeros_like(is_far).scatter(1, score.topk(count).indices, True) & is_far
    if not options.causal:
        return _block_mask(None, is_own | is_chosen, None)
    return _block_mask(row == column, (is_own & (column < row)) | is_chosen, _is_earlier)


def _block_mask(partial_blocks: Tensor | None, full_blocks: Tensor, mask_mod: Any) -> BlockMask:
    if partial_blocks is None:
        partial_blocks = torch.zeros_like(full_blocks)
    count, index, full_count, full_index = (
        x[None, None]
        for blocks in (partial_blocks, full_blocks)
        for x in (blocks.sum(-1).int(), blocks.int().argsort(dim=-1, descending=True, stable=True).int())
    )
    return BlockMask.from_kv_blocks(count, index, full_count, full_index, BLOCK_SIZE=FLEX_BLOCK, mask_mod=mask_mod)


def _is_earlier(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return query >= key


def _nsa(problem: Problem) -> Variant:
    try:
        from fla.ops.nsa.parallel import parallel_nsa  # type: ignore[import-not-found]
    except ImportError as error:
        reason = "not installed" if error.name == "fla" else f"cannot be imported: {error}"
        raise UnavailableError(reason) from None
    q, k, v = problem.qkv
    if problem.cu_seqlens is not None:
        raise UnavailableError("timed without documents only")
    if not problem.options.causal:
        raise UnavailableError("causal only")
    num_heads = q.shape[1]
    if num_heads % NSA_GROUP:
        raise UnavailableError(f"needs heads in multiples of {NSA_GROUP}")
    num_kv_heads = min(k.shape[1], num_heads // NSA_GROUP)
    tokens_first = [x.transpose(1, 2).contiguous() for x in (q, k[:, :num_kv_heads], v[:, :num_kv_heads])]
    generator = torch.Generator(q.device).manual_seed(3)
    gates = [q.new_empty(1, q.shape[2], num_heads).uniform_(generator=generator) for _ in range(2)]

    def attend(q: Tensor, k: Tensor, v: Tensor, compressed_gate: Tensor, selected_gate: Tensor) -> Tensor:
        return cast(
            Tensor,
            parallel_nsa(
                q,
                k,
                v,
                g_cmp=compressed_gate,
                g_slc=selected_gate,
                block_counts=problem.options.top_k,
                block_size=problem.options.key_cluster,
                scale=problem.softmax_scale,
            ),
        )

    return Variant("nsa", attend, (*tokens_first, *gates))


_MAKERS: dict[str, Callable[[Problem], Variant]] = {
    "muse": _muse,
    "cudnn": _cudnn,
    "flash": _flash,
    "flex": _flex,
    "nsa": _nsa,
    "reference": _reference,
}
