"""A copy of a checkpoint: equal, its own, never larger than what is distinct in it."""

from collections import OrderedDict
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from muse_lightning.checkpoints.host_copy import HostCopy


def checkpoint(device: str = "cpu") -> dict[str, Any]:
    weight = torch.randn(7, 5, device=device)
    return {
        "state_dict": OrderedDict(a=weight, b=weight, c=torch.randn(3, 4, device=device).t()),
        "optimizer_states": [{"state": {0: {"step": torch.tensor(3.0), "exp_avg": weight.bfloat16()}}, "lr": 0.1}],
        "others": ([torch.ones(2, dtype=torch.bool)], torch.empty(0, 3), None, "text", (1, 2)),
    }


def assert_same(found: Any, wanted: Any) -> None:
    if isinstance(wanted, torch.Tensor):
        assert found.dtype == wanted.dtype
        assert found.device.type == "cpu"
        assert torch.equal(found, wanted.cpu())
    elif isinstance(wanted, dict):
        assert type(found) is type(wanted)
        assert list(found) == list(wanted)
        for key in wanted:
            assert_same(found[key], wanted[key])
    elif isinstance(wanted, list | tuple):
        assert type(found) is type(wanted)
        for left, right in zip(found, wanted, strict=True):
            assert_same(left, right)
    else:
        assert found == wanted


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_copy_is_equal_and_shares_nothing(device: str) -> None:
    original, untouched = checkpoint(device), checkpoint(device)
    copier = HostCopy()
    torch.manual_seed(1)
    original = checkpoint(device)
    torch.manual_seed(1)
    untouched = checkpoint(device)
    found = copier.take(original)
    assert_same(found, untouched)
    original["state_dict"]["a"].zero_()
    original["optimizer_states"][0]["lr"] = 0.2
    original["optimizer_states"][0]["state"][0]["exp_avg"].zero_()
    assert_same(found, untouched)
    assert found["state_dict"]["a"] is found["state_dict"]["b"]
    if device == "cuda":
        assert found["state_dict"]["a"].is_pinned()


def test_memory_is_reused_and_holds_what_is_distinct_once() -> None:
    weight = torch.randn(1000, 100)
    copier = HostCopy()
    first = copier.take({"a": weight, "b": weight, "c": weight.view(100, 1000)})
    assert len(copier._buffer) == 2 * weight.nbytes
    second = copier.take({"a": weight + 1})
    assert second["a"].data_ptr() == first["a"].data_ptr()
    copier.free()
    assert len(copier._buffer) == 0


def test_memory_that_cannot_be_pinned_is_reused_too(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def register(address: int, size: int, flags: int) -> int:
        asked.append(size)
        return 1

    monkeypatch.setattr(torch.cuda, "cudart", lambda: SimpleNamespace(cudaHostRegister=register))
    copier = HostCopy()
    copier.reserve(4096, is_pinned=True)
    buffer = copier._buffer
    copier.reserve(4096, is_pinned=True)
    assert copier._buffer is buffer
    assert asked == [4096]


def test_a_file_holds_each_tensor_alone(tmp_path: Any) -> None:
    """Not the whole buffer once for every tensor."""
    state = {str(index): torch.randn(1000) for index in range(20)}
    torch.save(HostCopy().take(state), tmp_path / "copy")
    torch.save(state, tmp_path / "original")
    assert (tmp_path / "copy").stat().st_size <= 1.01 * (tmp_path / "original").stat().st_size
    assert_same(torch.load(tmp_path / "copy", weights_only=True), state)
