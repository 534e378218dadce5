"""Nats and hits of chosen predictions: logits exist for them alone.

Letters: M predictions, E hidden size, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.no_grad()
def token_scores(hidden: Tensor, head_weight: Tensor, targets: Tensor, *, chunk: int = 1024) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood of each target, and whether it is the most likely token.

    Args:
        hidden: [M, E], final states from which the targets are predicted.
        head_weight: [V, E].
        targets: int64 [M].
        chunk: predictions whose logits exist at once.
    Returns:
        nats float32 [M], is_top bool [M].
    """
    nats, is_top = [hidden.new_zeros(0, dtype=torch.float32)], [targets.new_zeros(0, dtype=torch.bool)]
    for states, wanted in zip(hidden.split(chunk), targets.split(chunk), strict=True):
        logits = F.linear(states, head_weight).float()
        nats.append(F.cross_entropy(logits, wanted, reduction="none"))
        is_top.append(logits.argmax(-1) == wanted)
    return torch.cat(nats), torch.cat(is_top)
