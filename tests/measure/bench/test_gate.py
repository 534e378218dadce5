"""The gate passes what is right, and nothing else."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from muse_kernels import muse_attention
from muse_kernels.attention.options import MuseOptions
from muse_lightning.measure.bench import gate
from muse_lightning.measure.bench.gate import NAMES, Check, run_gate
from muse_lightning.measure.bench.inputs import Heads

HEADS = Heads(8, 4, 32, torch.bfloat16)
Tamper = Callable[..., Any]


def checks(options: MuseOptions | None = None, *, has_documents: bool = False, heads: Heads = HEADS) -> list[Check]:
    return run_gate(options or MuseOptions(), heads, has_documents=has_documents, device="cpu")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "options",
    [MuseOptions(), MuseOptions(causal=False, order=0, selection="centroid", top_k=0)],
    ids=["default", "other"],
)
def test_the_reference_passes(options: MuseOptions, dtype: torch.dtype) -> None:
    found = checks(options, has_documents=True, heads=Heads(4, 1, 16, dtype))
    assert all(check.is_passed for check in found), [str(check) for check in found if not check.is_passed]
    assert [check.name for check in found[:3]] == ["out (largest)", "out (mean)", "dq (largest)"]
    assert len(found) == 18
    assert {check.case for check in found} == {"one document", "packed documents"}
    # Limits are of the size of a rounding: 1 % of values of size one.
    assert all(check.limit < 0.02 for check in found if check.name.endswith("(mean)"))


def replaced(monkeypatch: pytest.MonkeyPatch, wrong: Tamper) -> None:
    """Put `wrong` in the place of what is timed; the reference stays."""

    def attention(*qkv: Tensor, **options: Any) -> Any:
        return (wrong if options["implementation"] == "auto" else muse_attention)(*qkv, **options)

    monkeypatch.setattr(gate, "muse_attention", attention)


def test_a_wrong_output(monkeypatch: pytest.MonkeyPatch) -> None:
    replaced(monkeypatch, lambda *qkv, **options: muse_attention(*qkv, **options) * 1.03)
    failed = {check.name for check in checks() if not check.is_passed}
    assert "out (mean)" in failed


@pytest.mark.parametrize("wrong", [float("nan"), 0.0], ids=["nan", "unwritten"])
def test_one_wrong_row(monkeypatch: pytest.MonkeyPatch, wrong: float) -> None:
    def attention(*qkv: Tensor, **options: Any) -> Tensor:
        out = muse_attention(*qkv, **options)
        assert isinstance(out, Tensor)
        is_last = torch.arange(out.shape[2]) == out.shape[2] - 1
        return torch.where(is_last[:, None], wrong, out)

    replaced(monkeypatch, attention)
    failed = [check for check in checks() if not check.is_passed]
    assert failed[0].name == "out (largest)"
    assert str(failed[0]).startswith("one document: out (largest) error ")


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_wrong_gradient(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def attention(*qkv: Tensor, **options: Any) -> Any:
        copies = [x.clone() for x in qkv]
        copies[number].register_hook(lambda gradient: gradient * 1.04)
        return muse_attention(*copies, **options)

    replaced(monkeypatch, attention)
    failed = {check.name for check in checks() if not check.is_passed}
    assert f"{NAMES[number + 1]} (mean)" in failed
    assert not {name for name in failed if name.startswith("out")}


@pytest.mark.parametrize("change", [{"key_clustering": "spatial"}, {"selection": "centroid", "top_k": 0}], ids=str)
def test_worse_clusters(monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]) -> None:
    def attention(*qkv: Tensor, **options: Any) -> Any:
        return muse_attention(*qkv, **(options if options["clusters"] is not None else options | change))

    replaced(monkeypatch, attention)
    assert [check.name for check in checks() if not check.is_passed] == ["own clusters: relative squared"]


def test_what_the_device_does_not_take_is_said() -> None:
    with pytest.raises(ValueError, match="dtype"):
        checks(heads=Heads(4, 2, 16, torch.int32))


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128])
def test_at_full_size_on_a_gpu(head_dim: int) -> None:
    found = run_gate(MuseOptions(), Heads(16, 8, head_dim, torch.bfloat16), has_documents=True, device="cuda")
    assert all(check.is_passed for check in found), [str(check) for check in found if not check.is_passed]
