"""What is timed computes what it says, as far as a CPU can tell; on a GPU, every peer."""

import sys
from dataclasses import replace
from importlib.util import find_spec
from types import ModuleType

import pytest
import torch
from torch import Tensor

from muse_kernels import muse_attention
from muse_lightning.attention.dense import Dense
from muse_lightning.measure.bench.inputs import Heads, cumulative_lengths, random_inputs
from muse_lightning.measure.bench.variants import (
    LABELS,
    Problem,
    UnavailableError,
    make_variant,
    same_density_mask,
)
from tests.measure.bench.fabricated import SMALL

HEADS = Heads(4, 2, 16, torch.float32)


def problem(num_tokens: int = 256, lengths: list[int] | None = None, **options: object) -> Problem:
    cu_seqlens = cumulative_lengths(lengths) if lengths else None
    return Problem(random_inputs(num_tokens, HEADS, "cpu"), replace(SMALL, **options), cu_seqlens)


@pytest.mark.parametrize("name", ["muse", "reference"])
@pytest.mark.parametrize("lengths", [None, [100, 156]])
def test_muse(name: str, lengths: list[int] | None) -> None:
    given = problem(lengths=lengths)
    variant = make_variant(name, given)
    assert variant.name == name
    options = {"chunk": 64, "query_cluster": 16, "key_cluster": 16, "top_k": 2, "exact_below": 0}
    expected = muse_attention(*given.qkv, cu_seqlens=given.cu_seqlens, **options)
    assert isinstance(expected, Tensor)
    torch.testing.assert_close(variant.forward(), expected)
    assert [g.shape for g in variant.forward_backward()] == [x.shape for x in given.qkv]


def test_flash_is_exact_attention() -> None:
    """PyTorch has a kernel of that name for CPUs too."""
    given = problem()
    variant = make_variant("flash", given)
    torch.testing.assert_close(variant.forward(), Dense(0)(*given.qkv, softmax_scale=16**-0.5))
    assert len(variant.forward_backward()) == 3


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("top_k", [0, 16, 64])
def test_the_mask_of_flex_attention_has_the_density_of_muse(causal: bool, top_k: int) -> None:
    options = replace(SMALL, chunk=256, query_cluster=64, key_cluster=16, top_k=top_k, causal=causal)
    mask = same_density_mask(2048, options, "cpu")
    blocks = mask.to_dense()[0, 0].bool()
    assert blocks.shape == (16, 16)
    far_blocks = top_k * 16 // 128
    for row, columns in enumerate(blocks):
        chunk = row // 2
        own = {2 * chunk, row} if causal else {2 * chunk, 2 * chunk + 1}
        chosen = set(columns.nonzero().flatten().tolist())
        far = chosen - {2 * chunk, 2 * chunk + 1}
        assert chosen - far == own
        in_sight = 2 * chunk if causal else 14
        assert len(far) == min(far_blocks, in_sight)
        assert not causal or all(column < 2 * chunk for column in far)
    if causal:
        assert mask.kv_num_blocks.tolist() == [[[1] * 16]]
        assert mask.kv_indices[0, 0, :, 0].tolist() == list(range(16))


def test_nsa_gets_tokens_first_and_few_key_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}

    def parallel_nsa(q: Tensor, k: Tensor, v: Tensor, **options: Tensor | int) -> Tensor:
        asked.update(options, shapes=[list(x.shape) for x in (q, k, v)])
        gates = options["g_cmp"] + options["g_slc"]
        return q * gates.unsqueeze(-1) + (k + v).repeat_interleave(16, dim=2)

    module = ModuleType("fla.ops.nsa.parallel")
    module.parallel_nsa = parallel_nsa
    for name in ("fla", "fla.ops", "fla.ops.nsa"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "fla.ops.nsa.parallel", module)
    qkv = random_inputs(64, Heads(32, 8, 16, torch.float32), "cpu")
    variant = make_variant("nsa", Problem(qkv, SMALL))
    assert len(variant.forward_backward()) == 5
    assert asked["shapes"] == [[1, 64, 32, 16], [1, 64, 2, 16], [1, 64, 2, 16]]
    assert (asked["block_counts"], asked["block_size"]) == (2, 16)
    with pytest.raises(UnavailableError, match="multiples of 16"):
        make_variant("nsa", problem())


@pytest.mark.parametrize(
    ("name", "given", "reason"),
    [
        ("nsa", problem(), "not installed"),
        ("flex", problem(lengths=[256]), "without documents"),
        ("flex", problem(250), "multiples of 128"),
        ("flex", problem(), "multiples of 128"),
        ("flash", problem(lengths=[256], causal=False), "causally only"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_a_peer_cannot_do(name: str, given: Problem, reason: str) -> None:
    if name == "nsa" and find_spec("fla"):
        pytest.skip("it is installed here")
    with pytest.raises(UnavailableError, match=reason):
        make_variant(name, given)


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [None, [1000, 1048]], ids=["one document", "documents"])
@pytest.mark.parametrize("name", list(LABELS))
def test_every_variant_on_a_gpu(name: str, lengths: list[int] | None) -> None:
    heads = Heads(16, 4, 64, torch.bfloat16)
    options = replace(SMALL, chunk=256, query_cluster=64, key_cluster=32, top_k=8)
    cu_seqlens = cumulative_lengths(lengths) if lengths else None
    given = Problem(random_inputs(2048, heads, "cuda"), options, cu_seqlens)
    try:
        variant = make_variant(name, given)
    except UnavailableError as error:
        pytest.skip(str(error))
    out = variant.forward()
    assert out.shape == variant.inputs[0].shape
    assert all(gradient.isfinite().all() for gradient in variant.forward_backward())
    if name in ("cudnn", "flash"):
        on_gpu = None if cu_seqlens is None else cu_seqlens.cuda()
        expected = Dense(0)(*given.qkv, softmax_scale=64**-0.5, cu_seqlens=on_gpu)
        torch.testing.assert_close(out, expected, atol=2e-2, rtol=2e-2)
