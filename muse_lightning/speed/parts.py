"""Each part of a training step alone: its time, its work, and how far it is from what the device can do.

A part is timed forward, and forward and backward, in the precision of the recipe; what the recipe computes again in the
backward pass counts once more forward, whole, though compiled it leaves out some products (parallelize.py). One block
stands for all; attention, for all layers of its kind.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from muse_lightning.attention import kind_of
from muse_lightning.data.batches import Batch, document_lengths
from muse_lightning.measure.bench.timing import Ceilings, Instruments, Timing
from muse_lightning.model.rope import rotation
from muse_lightning.parallelize import Recompute
from muse_lightning.training.loss import total_nats
from muse_lightning.training.module import LanguageModel
from muse_lightning.training.optim import make_optimizer

BACKWARD_OVER_FORWARD = 2
"""A product with weights costs two in the backward pass; a query-key pair is counted so (measure/flops.py)."""
ATTENTION = "attention"
"""The part's name; where layers have several kinds, with the kind behind a comma."""
ADAMW_BYTES_PER_PARAMETER = 7 * 4
"""AdamW reads a parameter, its gradient and two moments in float32, and writes all but the gradient."""

_RECOMPUTED: dict[Recompute, frozenset[str]] = {
    "none": frozenset(),
    "keep_attention": frozenset({"before attention", "after attention"}),
    "block": frozenset({"before attention", ATTENTION, "after attention"}),
}


@dataclass(frozen=True)
class Part:
    """One part of an optimizer step with one micro-batch.

    Attributes:
        ms: In all layers, forward, backward and what is computed again.
        forward_ms: Of which forward, once.
        layer_ms: Of one layer, forward and backward.
        flops: Of matrix products, those computed again included; 0 where there are none.
        flops_fraction: Of the device's largest product.
        bytes_fraction: Of the device's copy; None where it is not counted.
    """

    name: str
    ms: float
    forward_ms: float
    layer_ms: float
    flops: float
    flops_fraction: float | None
    bytes_fraction: float | None = None


@dataclass(frozen=True)
class _Work:
    """A part as it is run: `run` gives what its gradient starts from; `leaves` get gradients."""

    run: Callable[[], Tensor | tuple[Tensor, ...]]
    leaves: list[Tensor]
    times: int
    forward_flops: float


def time_parts(
    model: LanguageModel,
    batch: Batch,
    recompute: Recompute,
    instruments: Instruments,
    ceilings: Ceilings,
    autocast: torch.dtype | None,
) -> list[Part]:
    """Time the parts of a step.

    Args:
        model: on the device, without anything that is computed again (`recompute` is accounted for).
        batch: on the device.
        autocast: dtype of mixed precision; None computes in the parameters' dtype.
    """
    context = torch.autocast(instruments.device, autocast) if autocast else nullcontext()
    runs: dict[str, Callable[[], object]] = {}
    works = _works(model, batch, context)
    for name, work in works.items():
        runs[f"{name} forward"] = _forward(work, context)
        runs[f"{name} both"] = _both(work, context)
    with torch.enable_grad():
        timings = instruments.time(runs)
    parts = []
    for name, work in works.items():
        again = name.partition(",")[0] in _RECOMPUTED[recompute]
        parts.append(_part(name, work, timings[f"{name} forward"], timings[f"{name} both"], again, ceilings))
    return [*parts, _optimizer_part(model, instruments, ceilings)]


def attention_passes(
    model: LanguageModel, batch: Batch, autocast: torch.dtype | None, device: str
) -> dict[str, Callable[[], object]]:
    """Forward and backward pass of one layer's attention, by the name of its part; to be run with gradients enabled."""
    context = torch.autocast(device, autocast) if autocast else nullcontext()
    works = _works(model, batch, context)
    return {name: _both(works[name], context) for name in _attention_layers(model)}


def _attention_layers(model: LanguageModel) -> dict[str, list[int]]:
    """The layers of each kind of attention, by the name of its part."""
    kinds: dict[str, list[int]] = {}
    for layer, block in enumerate(model.llama.blocks):
        kinds.setdefault(kind_of(block.self_attn.attention), []).append(layer)
    return {ATTENTION if len(kinds) == 1 else f"{ATTENTION}, {kind}": layers for kind, layers in kinds.items()}


def _works(model: LanguageModel, batch: Batch, context: AbstractContextManager[object]) -> Mapping[str, _Work]:
    llama, block = model.llama, model.llama.blocks[len(model.llama.blocks) // 2]
    ids, documents = batch["input_ids"], batch.get("cu_seqlens")
    rows, seq_len = ids.shape
    cos, sin = rotation(llama.config, torch.arange(seq_len, device=ids.device)[None])
    with context, torch.no_grad():
        embedded = llama.model.embed_tokens(ids)
        x = torch.randn_like(embedded).requires_grad_()
        q, k, v = (y.detach().requires_grad_() for y in block.before_attention(x, cos, sin))
        out = block.self_attn.attend(q, k, v, documents).detach().requires_grad_()
        hidden = llama.model.norm(x).detach().requires_grad_()
    layers, tokens = len(llama.blocks), rows * seq_len
    lengths = document_lengths(rows, seq_len, documents)
    per_pair = 4 * llama.config.attention_head_dim * llama.config.num_attention_heads
    attention = block.self_attn
    projections = sum(p.weight.numel() for p in (attention.q_proj, attention.k_proj, attention.v_proj))
    rest = attention.o_proj.weight.numel() + sum(p.numel() for p in block.mlp.parameters() if p.ndim == 2)
    head = llama.lm_head.weight

    def attention_work(of_kind: list[int]) -> _Work:
        layer = llama.blocks[of_kind[len(of_kind) // 2]].self_attn
        pairs = layer.attention.pairs(lengths, has_documents=documents is not None)
        return _Work(lambda: layer.attend(q, k, v, documents), [q, k, v], len(of_kind), per_pair * pairs)

    before, after = (
        [p for module in modules for p in module.parameters()]
        for modules in (
            (block.input_layernorm, attention.q_proj, attention.k_proj, attention.v_proj),
            (block.post_attention_layernorm, attention.o_proj, block.mlp),
        )
    )
    return {
        "embedding": _Work(lambda: llama.model.embed_tokens(ids), [llama.model.embed_tokens.weight], 1, 0),
        "before attention": _Work(
            lambda: block.before_attention(x, cos, sin), [x, *before], layers, 2.0 * projections * tokens
        ),
        **{name: attention_work(of_kind) for name, of_kind in _attention_layers(model).items()},
        "after attention": _Work(lambda: block.after_attention(x, out), [x, out, *after], layers, 2.0 * rest * tokens),
        "head and loss": _Work(
            lambda: total_nats(hidden, head, batch["labels"], chunk=model.loss_chunk, compiled=model.compiled),
            [hidden, head],
            1,
            2.0 * head.numel() * tokens,
        ),
    }


def _forward(work: _Work, context: AbstractContextManager[object]) -> Callable[[], object]:
    def run() -> None:
        with torch.no_grad(), context:
            work.run()

    return run


def _both(work: _Work, context: AbstractContextManager[object]) -> Callable[[], object]:
    def run() -> None:
        with context:
            found = work.run()
        outputs = [found] if isinstance(found, Tensor) else list(found)
        torch.autograd.grad(outputs, work.leaves, [torch.ones_like(output) for output in outputs])

    return run


def _part(name: str, work: _Work, forward: Timing, both: Timing, again: bool, ceilings: Ceilings) -> Part:
    ms = work.times * (both.median_ms + (forward.median_ms if again else 0.0))
    flops = work.times * work.forward_flops * (1 + again + BACKWARD_OVER_FORWARD)
    fraction = flops / (ms / 1000) / ceilings.flops_per_s if flops else None
    return Part(name, ms, work.times * forward.median_ms, both.median_ms, flops, fraction)


def _optimizer_part(model: LanguageModel, instruments: Instruments, ceilings: Ceilings) -> Part:
    parameters = list(model.llama.parameters())
    optimizer = make_optimizer([group | {"lr": 0.0} for group in model.parameter_groups()], fused=True)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)

    def step() -> None:
        torch.nn.utils.clip_grad_norm_(parameters, 1.0, foreach=True)
        optimizer.step()

    ms = instruments.time({"step": step})["step"].median_ms
    size = ADAMW_BYTES_PER_PARAMETER * sum(parameter.numel() for parameter in parameters)
    for parameter in parameters:
        parameter.grad = None
    bytes_fraction = size / (ms / 1000) / ceilings.bytes_per_s if model.optimizer == "adamw" else None
    return Part("clipping and optimizer", ms, 0.0, ms, 0.0, None, bytes_fraction)
