"""Registers "muse" and "muse_exact" in transformers, for the tests of this folder alone."""

import copy
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from muse_lightning.drop_in import register_with_transformers
from tests.drop_in.examples import APPROXIMATE, LENGTH, Recorder


@pytest.fixture(scope="module", autouse=True)
def registered() -> Iterator[None]:
    """ "muse", which approximates every row in these tests, and "muse_exact", which none."""
    mappings = [interface._global_mapping for interface in (AttentionInterface, AttentionMaskInterface)]
    before = copy.copy(mappings[0]), copy.copy(mappings[1])
    register_with_transformers(**APPROXIMATE, implementation="reference")
    register_with_transformers("muse_exact", **(APPROXIMATE | {"exact_below": 10 * LENGTH}), implementation="reference")
    yield
    for mapping, content in zip(mappings, before, strict=True):
        mapping.clear()
        mapping.update(content)


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """What "muse" is called with and returns, a layer after the other."""
    calls: Recorder = []
    attend = AttentionInterface()["muse"]

    def recorded(module: torch.nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **others: Any) -> Any:
        out, weights = attend(module, q, k, v, mask, **others)
        calls.append(SimpleNamespace(module=module, q=q, k=k, v=v, mask=mask, others=others, out=out))
        return out, weights

    monkeypatch.setitem(AttentionInterface._global_mapping, "muse", recorded)
    return calls
