"""The loss of a model under one attention, block by block and by tokens in sight."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import stdev
from typing import cast

import torch

from muse_lightning.callbacks.loss_by_position import sums_by_context
from muse_lightning.compare.blocks import Blocks
from muse_lightning.data.batches import to_device
from muse_lightning.errors import UserError
from muse_lightning.model.llama import Llama
from muse_lightning.training.loss import next_token_nats


@dataclass(frozen=True)
class Losses:
    """Negative log-likelihoods of all labels.

    Attributes:
        nats: Of each block, summed over its labels.
        labels: Of each block.
        text_bytes: That the labels of each block stand for.
        by_context: Mean over labels that see at least 2^i and less than 2^(i + 1) tokens, nan where there is none.
        counts: Of those labels.
    """

    nats: Sequence[float]
    labels: Sequence[int]
    text_bytes: Sequence[int]
    by_context: Sequence[float]
    counts: Sequence[int]

    @property
    def mean(self) -> float:
        """Nats per label."""
        return sum(self.nats) / sum(self.labels)

    @property
    def bits_per_byte(self) -> float | None:
        """None where the labels stand for no text."""
        total = sum(self.text_bytes)
        return sum(self.nats) / (math.log(2) * total) if total else None

    def rise(self, exact: "Losses") -> tuple[float, float | None]:
        """How much larger the mean is than that of `exact` on the same blocks, and the standard error of that
        difference over blocks; None for a single block."""
        differences = [
            (own - other) / labels for own, other, labels in zip(self.nats, exact.nats, self.labels, strict=True)
        ]
        error = stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else None
        return self.mean - exact.mean, error


def losses(llama: Llama, blocks: Blocks, loss_chunk: int) -> Losses:
    """Evaluate a model, with the attention that it has, on all blocks.

    Args:
        llama: in evaluation mode, on the device that it shall run on.
        loss_chunk: tokens whose logits exist at once.
    Raises:
        UserError: the loss is not finite.
    """
    nats, sums, counts = [], [], []
    with torch.no_grad():
        for batch in blocks.batches:
            on_device = to_device(batch, llama.lm_head.weight.device)
            hidden = llama.hidden_states(on_device["input_ids"], cu_seqlens=on_device.get("cu_seqlens"))
            of_tokens = next_token_nats(hidden, llama.lm_head.weight, on_device["labels"], chunk=loss_chunk)
            total, count = sums_by_context(of_tokens, cast(dict[str, torch.Tensor], on_device))
            nats.append(of_tokens.double().sum().item())
            sums.append(total.double().cpu())
            counts.append(count.double().cpu())
    if not math.isfinite(sum(nats)):
        raise UserError(f"the loss is {sum(nats)} in {llama.lm_head.weight.dtype}; give another --dtype, as float32")
    total, count = torch.stack(sums).sum(0), torch.stack(counts).sum(0)
    return Losses(
        nats, blocks.labels(), blocks.text_bytes(), (total / count).tolist(), [int(each) for each in count.tolist()]
    )
