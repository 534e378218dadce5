"""Which token comes next: greedy, or drawn from the nucleus of the distribution."""

import torch
from torch import Tensor

from muse_lightning.errors import UserError


class Sampler:
    """Chooses tokens from logits.

    Args:
        temperature: logits are divided by it; 0 is greedy: always the most likely token.
        top_p: tokens are drawn from the fewest most likely ones whose probabilities, at this temperature, sum to at
            least this; 1 is all tokens.
        seed: equal seeds choose equal tokens on one kind of device; None: a new one each time.
        device: where logits are.
    Raises:
        UserError: a value out of range.
    Source: nucleus sampling, Holtzman et al. 2020 (arXiv 1904.09751).
    """

    def __init__(self, temperature: float, top_p: float, seed: int | None, device: torch.device) -> None:
        if not 0 <= temperature < float("inf"):
            raise UserError(f"temperature is {temperature}; it must be at least 0 and finite")
        if not 0 < top_p <= 1:
            raise UserError(f"top_p is {top_p}; it must be above 0 and at most 1")
        if seed is not None and not 0 <= seed < 2**63:
            raise UserError(f"seed is {seed}; it must be at least 0 and below 2^63")
        self.temperature = temperature
        self.top_p = top_p
        self._generator = torch.Generator(device)
        if seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(seed)

    def choose(self, logits: Tensor) -> int:
        """One token.

        Args:
            logits: [V], any floating-point dtype; minus infinity is probability 0.
        Raises:
            UserError: the largest logit is not finite, or one is no number.
        """
        largest = logits.max()  # NaN where one of them is
        if not largest.isfinite():
            dtype = str(logits.dtype).removeprefix("torch.")
            is_wide = logits.dtype in (torch.float32, torch.float64)
            cause = (
                "weights of the model are not finite" if is_wide else "next: --dtype=float32, where weights are finite"
            )
            raise UserError(f"logits are not finite ({largest.item()}), computed in {dtype}; {cause}")
        if self.temperature == 0:
            return int(logits.argmax())
        logits = logits.float()
        # Relative to the largest, so that no temperature overflows.
        probabilities = ((logits - largest.float()) / self.temperature).softmax(-1)
        kept, tokens = nucleus(probabilities, self.top_p)
        return int(tokens[torch.multinomial(kept, 1, generator=self._generator)])


def nucleus(probabilities: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """The fewest most likely tokens whose probabilities sum to at least `top_p`.

    Args:
        probabilities: [V], sum 1.
    Returns:
        Probabilities, descending, 0 outside the nucleus, and the tokens that they belong to, int64; [V] each.
    """
    descending, tokens = probabilities.sort(descending=True, stable=True)
    before = descending.cumsum(-1) - descending
    return torch.where(before < top_p, descending, 0), tokens
