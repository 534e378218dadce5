"""Memory that a training step needs, by part, found without allocating any of it."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from muse_lightning.model.llama import AttentionFactory, Llama, LlamaConfig
from muse_lightning.parallelize import Recompute, recompute_in_backward

FLOAT32 = 4
"""Bytes."""


@dataclass(frozen=True)
class StepMemory:
    """Bytes of one training step on one device, by part, without what libraries and the allocator take besides."""

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    loss: int

    @property
    def total(self) -> int:
        """All parts together, as if at the same time: activations are freed while gradients come into being."""
        return self.parameters + self.gradients + self.optimizer + self.activations + self.loss


def step_memory(
    config: LlamaConfig,
    attention: AttentionFactory,
    *,
    batch_size: int,
    seq_len: int,
    loss_chunk: int,
    recompute: Recompute = "none",
    dtype: torch.dtype = torch.float32,
    autocast: torch.dtype | None,
) -> StepMemory:
    """Estimate the memory of a training step, all parameters on one device.

    The forward pass runs on tensors without content, and what autograd keeps of it is counted: the estimate follows
    the model and the attention strategy as they are.

    Args:
        config, attention: the model.
        batch_size, seq_len: sequences of a step on one device, before accumulation, and their tokens.
        loss_chunk: tokens whose logits exist at once.
        recompute: what is computed again in the backward pass; the inside of one block is added.
        dtype: of the parameters, and with them of gradients and of AdamW's two moments.
        autocast: dtype of mixed precision; None computes in the parameters' dtype.
    """

    def kept(num_layers: int, recompute: Recompute) -> tuple[int, int]:
        """Bytes of the parameters, and of what autograd keeps."""
        with FakeTensorMode(), default_dtype(dtype):
            last = config.num_hidden_layers - 1
            llama = Llama(replace(config, num_hidden_layers=num_layers), lambda layer: attention(min(layer, last)))
            recompute_in_backward(llama, recompute)
            input_ids = torch.zeros(batch_size, seq_len, dtype=torch.int64)
            with saved_storages(llama) as saved, torch.autocast("cpu", autocast) if autocast else nullcontext():
                hidden = llama.hidden_states(input_ids)
            # The hidden states feed the head and are kept for it.
            saved[hidden.untyped_storage()._cdata] = hidden.untyped_storage()
            parameters = sum(parameter.nbytes for parameter in llama.parameters())
            return parameters, sum(storage.nbytes() for storage in saved.values())

    parameters, activations = kept(config.num_hidden_layers, recompute)
    if recompute != "none":
        activations += kept(2, "none")[1] - kept(1, "none")[1]
    # A chunk's logits and their gradient, in float32 (training/loss.py).
    loss = 2 * FLOAT32 * min(loss_chunk, batch_size * seq_len) * config.vocab_size
    return StepMemory(parameters, parameters, 2 * parameters, activations, loss)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Inside, new floating-point tensors have this dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def saved_storages(llama: Llama) -> Iterator[dict[int, torch.UntypedStorage]]:
    """Collects, by address, the storages that autograd saves inside the block, without those of parameters.

    Of a block that is computed again autograd does not see the inputs that are kept for that; they are added.
    """
    saved: dict[int, torch.UntypedStorage] = {}
    parameters = {parameter.untyped_storage()._cdata for parameter in llama.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters:
            saved[storage._cdata] = storage
        return tensor

    def pack_inputs(_: torch.nn.Module, inputs: tuple[object, ...]) -> None:
        for tensor in inputs:
            if isinstance(tensor, Tensor):
                pack(tensor)

    hooks = [block.register_forward_pre_hook(pack_inputs) for block in llama.blocks]
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            yield saved
    finally:
        for hook in hooks:
            hook.remove()
