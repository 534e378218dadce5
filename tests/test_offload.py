"""Gradients by way of the host, what goes there and when, and memory on a GPU."""

import weakref
from functools import partial

import pytest
import torch
from torch import Tensor

import muse_lightning.offload as under_test
from muse_lightning.attention import AttentionStrategy, Dense, Muse
from muse_lightning.model import Llama, LlamaConfig
from muse_lightning.offload import Offload, Transfers
from muse_lightning.parallelize import Recompute, offload_kept, recompute_in_backward, tile_feed_forward

CONFIG = LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=2**20,
)
MUSE = partial(Muse, chunk=16, query_cluster=4, key_cluster=4, top_k=1, exact_below=0)
TOKENS = 96
HIDDEN = TOKENS * CONFIG.hidden_size * 4
"""Bytes of the residual stream."""


@pytest.fixture
def small_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything of at least half the residual stream is large."""
    monkeypatch.setattr(under_test, "MIN_BYTES", HIDDEN // 2)


class Noted(Transfers):
    """Notes what is copied, and what is on the device meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[str] = []
        self.bytes_out = self.bytes_back = 0

    def to_host(self, x: Tensor) -> tuple[Tensor, None]:
        self.events.append("out")
        self.bytes_out += x.nbytes
        return super().to_host(x)[0], None

    def to_device(self, host: Tensor, device: torch.device) -> tuple[Tensor, None]:
        self.events.append("back")
        self.bytes_back += host.nbytes
        return super().to_device(host, device)[0], None


def gradients(
    policy: Recompute, attention: type[AttentionStrategy], offloads: bool, every: int = 1, tiles: int = 1
) -> tuple[dict[str, Tensor], Noted]:
    torch.manual_seed(0)
    llama = Llama(CONFIG, attention)
    tile_feed_forward(llama, tiles)
    recompute_in_backward(llama, policy, every)
    noted = Noted()
    if offloads:
        offload_kept(llama, every).transfers = noted
    for block in llama.blocks:
        block.register_forward_hook(lambda *_: noted.events.append("forward"))
        block.register_full_backward_hook(lambda *_: noted.events.append("backward"))
    for _ in range(2):  # micro-batches
        llama(torch.randint(64, (1, TOKENS))).square().sum().backward()
    return {name: p.grad for name, p in llama.named_parameters() if p.grad is not None}, noted


@pytest.mark.usefixtures("small_tensors")
@pytest.mark.parametrize(("every", "tiles"), [(1, 1), (2, 1), (3, 2)])
@pytest.mark.parametrize("policy", ["keep_attention", "block"])
@pytest.mark.parametrize("attention", [Dense, MUSE], ids=["Dense", "Muse"])
def test_gradients_are_equal(attention: type[AttentionStrategy], policy: Recompute, every: int, tiles: int) -> None:
    plain, _ = gradients(policy, attention, offloads=False, every=every, tiles=tiles)
    found, noted = gradients(policy, attention, offloads=True, every=every, tiles=tiles)
    assert plain.keys() == found.keys()
    for name, gradient in plain.items():
        assert torch.equal(gradient, found[name]), name
    blocks = len(range(0, CONFIG.num_hidden_layers, every))
    # In: the block's input. Dense attention also: q, k, v, its result; no more, and nothing twice.
    kept = {"block": HIDDEN, "keep_attention": HIDDEN * (1 + 1 + 0.5 + 0.5 + 1)}[policy]
    if attention is Dense:
        assert noted.bytes_out == 2 * blocks * kept
        assert noted.bytes_back == 2 * (blocks - 1) * kept


@pytest.mark.usefixtures("small_tensors")
def test_a_block_is_brought_back_while_the_one_before_computes() -> None:
    _, noted = gradients("block", Dense, offloads=True)
    forward = ["out", "forward"] * 4
    # The last one is still there, and asks for the one behind it before it begins.
    backward = ["back", "backward"] * 3 + ["backward"]
    assert [event for event in noted.events if event != "forward"][: 4 + 7] == ["out"] * 4 + backward
    assert noted.events[:8] == forward


@pytest.mark.usefixtures("small_tensors")
def test_between_blocks_one_is_on_the_device() -> None:
    """By tensors that are alive: forward, of the block that may be on its way; backward, of the one brought back."""
    llama = Llama(CONFIG, Dense)
    recompute_in_backward(llama, "block")
    offload = offload_kept(llama)
    alive: list[int] = []
    kept: weakref.WeakSet[under_test._Block] = weakref.WeakSet()

    def look(*_: object) -> None:
        if offload._last is not None:
            kept.add(offload._last)
        alive.append(sum(s.x is not None for b in kept for s in b.storages.values()))

    for block in llama.blocks:
        block.register_forward_hook(look)
        block.register_full_backward_hook(look)
    llama(torch.randint(64, (1, TOKENS))).sum().backward()
    assert len(alive) == 8
    assert max(alive) == 1
    assert offload._last is None
    assert len(kept) == 0


def test_what_is_small_or_shared_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cosine and sine are kept by every block, and are the same for all."""
    monkeypatch.setattr(under_test, "MIN_BYTES", 1024)
    weight = torch.nn.Parameter(torch.randn(64, 64))
    x, shared, small = (torch.randn(*size, requires_grad=True) for size in ((64, 64), (64, 64), (4, 4)))
    y = x * 1
    offload = Offload()
    noted = offload.transfers = Noted()
    out = offload.run(lambda y, shared: (y @ weight).sin() * shared[:, :] + small.exp().sum(), True, y, shared)
    # y, and what sin keeps; the product with `shared` keeps both of its factors.
    assert noted.events == ["out"] * 3
    out.sum().backward()
    assert noted.events == ["out"] * 3  # of the last block nothing had left


def test_without_gradients_nothing_is_copied() -> None:
    offload = Offload()
    noted = offload.transfers = Noted()
    with torch.no_grad():
        offload.run(lambda x: x.sin(), True, torch.randn(2**19, requires_grad=True))
    assert noted.events == []


@pytest.mark.gpu
@pytest.mark.parametrize("policy", ["keep_attention", "block"])
@pytest.mark.parametrize("attention", [Dense, Muse], ids=["Dense", "Muse"])
def test_on_a_gpu(attention: type[AttentionStrategy], policy: Recompute) -> None:
    """Gradients are as near to those of a run without as two such runs to each other, of which one pair is a small
    sample, or within 1e-6, where a wrong tensor would be off by percents; and what a step takes at its peak is less by
    what all blocks but two keep; over several steps, in which buffers are used again."""
    tokens, layers = 32768, 8
    config = LlamaConfig(
        **(vars(CONFIG) | {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": layers})
    )
    found, peaks = [], []
    for offloads in (False, False, True):
        torch.manual_seed(0)
        llama = Llama(config, attention).to("cuda")
        recompute_in_backward(llama, policy)
        if offloads:
            offload_kept(llama)
        ids = torch.randint(64, (1, tokens), device="cuda")
        for _ in range(3):
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            with torch.autocast("cuda", torch.bfloat16):
                loss = llama.hidden_states(ids).float().square().mean()
            loss.backward()
        found.append(torch.cat([p.grad.flatten() for p in llama.parameters() if p.grad is not None]))
        peaks.append(torch.cuda.max_memory_allocated() - before)
        del llama, loss
    plain, again, offloaded = found
    assert (plain - offloaded).norm() <= max(2 * (plain - again).norm(), 1e-6 * plain.norm())
    hidden = tokens * config.hidden_size * 4
    per_block = hidden if policy == "block" else hidden * (1 + (1 + 0.5 + 0.5 + 1) / 2)
    assert peaks[1] - peaks[2] > 0.8 * (layers - 2) * per_block
