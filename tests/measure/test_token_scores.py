"""Nats and hits against all logits at once in float64."""

import pytest
import torch
import torch.nn.functional as F

from muse_lightning.measure.token_scores import token_scores


@pytest.mark.parametrize("count", [0, 1, 7, 23])
def test_against_all_logits(count: int) -> None:
    hidden, weight = torch.randn(count, 8), torch.randn(50, 8)
    targets = torch.randint(50, (count,))
    logits = hidden.double() @ weight.double().T
    if count:
        targets[0] = logits[0].argmax()
    nats, is_top = token_scores(hidden, weight, targets, chunk=5)
    torch.testing.assert_close(nats.double(), F.cross_entropy(logits, targets, reduction="none"), atol=1e-5, rtol=1e-5)
    assert torch.equal(is_top, logits.argmax(-1) == targets)
