"""Memory that a training step needs at its peak, by part, found without allocating any of it."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from inspect import ismethod
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.function import once_differentiable

from muse_kernels.attention.checks import HAS_TRITON
from muse_kernels.attention.chunks import num_rows
from muse_kernels.attention.options import ResolvedOptions
from muse_lightning.attention import Muse, kind_of
from muse_lightning.data.batches import Batch
from muse_lightning.errors import UserError, reason_of
from muse_lightning.measure.info import MIB, MIXED_DTYPES, TRUE_DTYPES
from muse_lightning.measure.live_memory import LiveMemory
from muse_lightning.offload import Transfers
from muse_lightning.training import loss as loss_module
from muse_lightning.training.compiled_memory import AsCompiled
from muse_lightning.training.module import LanguageModel

if HAS_TRITON:
    from muse_kernels.attention.workspace import Workspace

ADAMW_MOMENTS, MUON_MOMENTS = 2, 1
"""Numbers per weight."""
FLOAT32 = 4
"""Bytes."""
Phase = Literal["forward", "loss", "backward"]
PHASES: dict[Phase, str] = {"forward": "forward pass", "loss": "loss", "backward": "backward pass"}
"""For a reader."""


@dataclass(frozen=True)
class StepMemory:
    """Bytes of one training step on one device at its peak, without what libraries and the allocator take besides.

    Attributes:
        parameters: They are always there.
        optimizer: AdamW's or Muon's moments, as well.
        gradients: Of parameters, as many as there are at the peak.
        forward: Made in the forward pass and still there: what the backward pass needs, and weights in the dtype of
            mixed precision.
        loss: Likewise, of the loss.
        backward: Made in the backward pass: gradients of activations, what is computed again, workspaces.
        phase: In which of the three the peak is.
    """

    parameters: int
    optimizer: int
    gradients: int
    forward: int
    loss: int
    backward: int
    phase: Phase

    @property
    def parts(self) -> dict[str, int]:
        """Bytes of each part."""
        return {name: size for name, size in asdict(self).items() if name != "phase"}

    @property
    def total(self) -> int:
        """The peak."""
        return sum(self.parts.values())


def step_memory(
    model: LanguageModel,
    *,
    batch_size: int,
    seq_len: int,
    accumulate: int,
    precision: str | int | None,
    device_type: Literal["cuda", "cpu"] = "cuda",
) -> StepMemory:
    """Predict the memory of a training step, all parameters on one device, each row of the batch one document.

    A twin of the model takes the step on tensors without content, forward and backward, in Lightning's order, and what
    is alive is counted: the prediction follows model, attention and what is computed again as they are. What is
    compiled keeps what the compiler decides, where it keeps everything; else it counts as not compiled. The optimizer's
    step is left out: fused AdamW and clipping make nothing, Muon one matrix's worth, and activations are gone by then.

    Args:
        model: on any device; only its options matter.
        batch_size, seq_len: sequences of a micro-batch on one device, and their tokens.
        accumulate: micro-batches of a step: from the second on all gradients are there.
        precision: Lightning's name of it.
        device_type: "cuda" has fused norms, and workspaces of attention's kernels; "cpu" PyTorch's operations alone.
    Raises:
        UserError: the attention strategy does not run on tensors without content.
    """
    on_gpu = device_type == "cuda"
    autocast = MIXED_DTYPES.get(str(precision))
    live = LiveMemory("cpu", _workspace_of_attention if on_gpu else lambda *_: 0)
    dtype = TRUE_DTYPES.get(str(precision), torch.float32)
    twin = model.twin(compiled=False, weights=None, seq_len=None, tokenizer_size=None)
    for module in twin.llama.modules():
        if isinstance(module, Muse):
            module.options["implementation"] = "auto"  # a kernel that is asked for wants a GPU
    if on_gpu and model.compiled and (model.recompute == "none" or model.recompute_every > 1):
        _as_compiled(twin)
    try:
        with (
            FakeTensorMode(),
            default_dtype(dtype),
            _fused_norms() if on_gpu else nullcontext(),
            _loss_of_a_gpu(model.compiled) if on_gpu else nullcontext(),
        ):
            _take_step(twin, live, batch_size, seq_len, accumulate, autocast, on_gpu)
    except RuntimeError as error:
        # It reads values, or has an operation that does not say what it returns: with content it may train.
        name = ", ".join({kind_of(block.self_attn.attention): None for block in twin.llama.blocks})
        raise UserError(
            f"memory cannot be predicted, for {name} does not run on tensors without content: {reason_of(error)}"
        ) from error
    parts = {name: live.at_peak[name] for name in StepMemory.__dataclass_fields__ if name != "phase"}
    return StepMemory(**parts, phase=live.kind_at_peak)  # type: ignore[arg-type]


def _take_step(
    twin: LanguageModel,
    live: LiveMemory,
    batch_size: int,
    seq_len: int,
    accumulate: int,
    autocast: torch.dtype | None,
    on_gpu: bool,
) -> None:
    parameters = _without_content(twin)
    if on_gpu and twin.offloading is not None:
        twin.offloading.transfers = _ToNowhere()
    for group in twin.parameter_groups():
        moments = MUON_MOMENTS if "momentum" in group else ADAMW_MOMENTS
        live.add("optimizer", moments * sum(parameter.nbytes for parameter in group["params"]))
    for parameter in parameters:
        live.label("parameters", parameter)
        if accumulate > 1:  # those of the micro-batch before
            parameter.grad = torch.empty_like(parameter)
            live.label("gradients", parameter.grad)
        parameter.register_post_accumulate_grad_hook(lambda p: live.label("gradients", p.grad))
    twin.llama.model.register_forward_hook(lambda *_: setattr(live, "kind", "loss"))
    with live:
        live.kind = "forward"
        input_ids, labels = (torch.zeros(batch_size, seq_len, dtype=torch.int64) for _ in range(2))
        with torch.autocast("cpu", autocast) if autocast else nullcontext():
            loss = twin.total_nats(Batch(input_ids=input_ids, labels=labels)) / (batch_size * seq_len)
        live.kind = "backward"
        loss.backward()


def _as_compiled(twin: LanguageModel) -> None:
    plans: dict[Any, Any] = {}
    for block in twin.llama.blocks:
        for name in ("before_attention", "add_attention" if twin.mlp_tiles > 1 else "after_attention"):
            method = getattr(block, name)
            if ismethod(method):  # and not a checkpoint of one
                setattr(block, name, AsCompiled(method, plans))


def _without_content(model: nn.Module) -> list[nn.Parameter]:
    """Give a model on the meta device parameters of the default dtype that look like a processor's."""
    made: dict[nn.Parameter, nn.Parameter] = {}  # one may have two places
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter not in made:
                made[parameter] = nn.Parameter(torch.empty(parameter.shape), parameter.requires_grad)
            setattr(module, name, made[parameter])
    return list(made.values())


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Inside, new floating-point tensors have this dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class _ToNowhere(Transfers):
    """Of a simulated GPU: what is on the host does not count."""

    def to_host(self, x: Tensor) -> tuple[Tensor, None]:
        return torch.empty_like(x, device="meta"), None

    def to_device(self, host: Tensor, device: torch.device) -> tuple[Tensor, None]:
        return torch.empty_like(host, device=device), None


def _workspace_of_attention(func: Any, args: tuple[Any, ...]) -> int:
    """Bytes that a GPU's kernel takes besides its results, where PyTorch on a processor has another kernel."""
    name = func.name() if isinstance(func, torch._ops.OpOverload) else ""
    is_backward = name.endswith("backward")
    if "_scaled_dot_product" in name:
        # Of dout, q, ...: FlashAttention and cuDNN sum the gradient of q in float32.
        return FLOAT32 * args[0].numel() if is_backward else 0
    if name.startswith("muse::attention"):
        # The near field's backward pass is FlashAttention's or cuDNN's; then come groups of the far field.
        q, k = args[1:3] if is_backward else args[:2]
        near = FLOAT32 * q.numel() if is_backward else 0
        return max(near, _far_field(q, k, ResolvedOptions.decoded(args[-1]), is_backward))
    return 0


def _far_field(q: Tensor, k: Tensor, options: ResolvedOptions, is_backward: bool) -> int:
    if not HAS_TRITON:
        return options.workspace_mib * MIB
    rows = num_rows(q.shape[2], None, options)
    return Workspace(q, k, rows, options, backward=is_backward).largest_group()


@contextmanager
def _fused_norms() -> Iterator[None]:
    """RMSNorm as one operation, as it is on a GPU; on a processor it is several that keep more.

    A replaced function: a TorchFunctionMode is not in force in a backward pass, where blocks are computed again.
    """

    def fused(x: Tensor, shape: list[int], weight: Tensor, eps: float | None = None) -> Tensor:
        return _FusedNorm.apply(x, weight)

    before = F.rms_norm
    F.rms_norm = fused  # type: ignore[assignment]
    try:
        yield
    finally:
        F.rms_norm = before


@contextmanager
def _loss_of_a_gpu(compiled: bool) -> Iterator[None]:
    """The loss as it is on a GPU: products are added to the head's gradient where they are made; compiled, softmax
    takes the place of the logits and makes nothing besides."""

    def in_place(logits: Tensor, labels: Tensor, *, with_softmax: bool) -> Tensor:
        return logits.new_empty(labels.shape, dtype=torch.float32)

    before = loss_module._nats, loss_module._add_product
    loss_module._add_product = lambda total, a, b: None
    if compiled:
        loss_module._nats = in_place
    try:
        yield
    finally:
        loss_module._nats, loss_module._add_product = before


class _FusedNorm(torch.autograd.Function):
    """What it makes and keeps, without content."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)
