"""What is computed again in the backward pass, and what is compiled, changes memory and speed, and nothing else."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, ClassVar, get_args

import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters

from muse_lightning.attention import AttentionStrategy, Dense, Muse
from muse_lightning.model.config import LlamaConfig
from muse_lightning.model.llama import Llama
from muse_lightning.parallelize import (
    Recompute,
    arrange,
    compile_around_attention,
    recompute_in_backward,
    residual_in_autocast,
    tile_feed_forward,
)

CONFIG = LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
)
MUSE = partial(Muse, chunk=16, query_cluster=4, key_cluster=4, top_k=1, exact_below=0)
POLICIES: tuple[Recompute, ...] = get_args(Recompute)


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


class Counted(Dense):
    """Exact attention that notes the layer of each call."""

    calls: ClassVar[list[int]] = []

    def forward(self, *args: Tensor, **options: object) -> Tensor:
        Counted.calls.append(self.layer_idx)
        return super().forward(*args, **options)


def train_step(
    policy: Recompute,
    attention: type[AttentionStrategy],
    backend: str | Callable[..., Any] | None = None,
    documents: tuple[int, ...] = (0, 60, 100),
    autocast: bool = False,
    every: int = 1,
    tiles: int = 1,
) -> tuple[dict[str, Tensor], int]:
    """Gradients of one step, and the number of elements kept for the backward pass; `autocast` is to bf16, the residual
    stream too."""
    torch.manual_seed(0)
    llama = Llama(CONFIG, attention)
    options = {"backend": backend} if backend is not None else {}
    arrange(
        llama,
        recompute=policy,
        recompute_every=every,
        mlp_tiles=tiles,
        compiled=backend is not None,
        residual_dtype="autocast",
        **options,
    )
    kept = 0

    def keep(x: Tensor) -> Tensor:
        nonlocal kept
        kept += x.numel()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), torch.autocast("cpu", enabled=autocast):
        logits = llama(torch.randint(64, (1, 100)), cu_seqlens=torch.tensor(documents, dtype=torch.int32))
    logits.float().square().sum().backward()
    return {name: p.grad for name, p in llama.named_parameters() if p.grad is not None}, kept


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bf16"])
@pytest.mark.parametrize("attention", [Dense, MUSE], ids=["Dense", "Muse"])
def test_gradients_are_equal_and_less_is_kept(attention: type[AttentionStrategy], autocast: bool) -> None:
    plain, *again = (train_step(policy, attention, autocast=autocast) for policy in POLICIES)
    assert len(plain[0]) > 20
    for gradients, _ in again:
        assert plain[0].keys() == gradients.keys()
        for name, gradient in plain[0].items():
            assert torch.equal(gradient, gradients[name]), name
    (_, kept_with_attention), (_, kept) = again
    assert kept < kept_with_attention / 2
    assert kept_with_attention < plain[1] / 2


@pytest.mark.parametrize("every", [2, 3, 4])
@pytest.mark.parametrize("policy", ["keep_attention", "block"])
def test_blocks_between_are_left_alone(policy: Recompute, every: int) -> None:
    plain, of_all = train_step("none", Dense), train_step(policy, Dense)
    of_some = train_step(policy, Dense, every=every)
    for name, gradient in plain[0].items():
        assert torch.equal(gradient, of_some[0][name]), name
    recomputed = len(range(0, CONFIG.num_hidden_layers, every))
    per_block = (plain[1] - of_all[1]) // CONFIG.num_hidden_layers
    assert of_some[1] == plain[1] - recomputed * per_block


@pytest.mark.parametrize("every", [1, 2, 3])
@pytest.mark.parametrize(("policy", "again"), [("none", 0), ("keep_attention", 0), ("block", 1)])
def test_attention_is_computed_again_only_with_its_block(policy: Recompute, again: int, every: int) -> None:
    Counted.calls.clear()
    train_step(policy, Counted, every=every)
    layers = range(CONFIG.num_hidden_layers)
    assert Counted.calls == [*layers, *(again * [layer for layer in reversed(layers) if layer % every == 0])]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("tiles", [2, 3, 200])
def test_tiles_change_no_gradient_and_no_more_is_kept(policy: Recompute, tiles: int) -> None:
    """200 are more than there are tokens."""
    torch.set_default_dtype(torch.float64)
    try:
        (plain, kept), (tiled, kept_by_tiles) = (train_step(policy, Dense, tiles=count) for count in (1, tiles))
    finally:
        torch.set_default_dtype(torch.float32)
    for name, gradient in plain.items():
        assert (tiled[name] - gradient).norm() < 1e-13 * gradient.norm(), name
    assert kept_by_tiles < kept if policy == "none" else kept_by_tiles == kept


@pytest.mark.parametrize("policy", POLICIES)
def test_the_feed_forward_network_runs_twice_whatever_else_is_computed_again(policy: Recompute) -> None:
    """By calls of one of its projections: a block that is computed again does not run the tiles once more."""
    llama = Llama(CONFIG, Dense)
    tile_feed_forward(llama, 4)
    recompute_in_backward(llama, policy)
    sizes: list[int] = []
    for block in llama.blocks:
        block.mlp.gate_proj.register_forward_hook(lambda _, inputs, output: sizes.append(output.shape[0]))
    llama(torch.randint(64, (2, 50))).square().sum().backward()
    assert sizes == [25] * 4 * 2 * CONFIG.num_hidden_layers


@pytest.mark.parametrize("tiles", [1, 3])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("attention", [Dense, MUSE], ids=["Dense", "Muse"])
def test_traced_gradients_are_equal(attention: type[AttentionStrategy], policy: Recompute, tiles: int) -> None:
    compare_with_plain(attention, policy, "aot_eager", tiles)


@pytest.mark.slow
@pytest.mark.parametrize("tiles", [1, 2])
def test_compiled_gradients_are_equal(tiles: int) -> None:
    compare_with_plain(MUSE, "keep_attention", "inductor", tiles)


def compare_with_plain(attention: type[AttentionStrategy], policy: Recompute, backend: str, tiles: int) -> None:
    plain, _ = train_step("none", attention)
    compiled, _ = train_step(policy, attention, backend, tiles=tiles)
    for name, gradient in plain.items():
        # Fused kernels round elsewhere.
        assert (compiled[name] - gradient).norm() < 1e-5 * gradient.norm(), name


def test_one_compilation_serves_all_blocks_documents_and_strategies() -> None:
    train_step("keep_attention", MUSE, "aot_eager")
    assert counters["stats"]["unique_graphs"] == 2
    train_step("keep_attention", MUSE, "aot_eager", documents=(0, 10, 20, 30, 100))
    train_step("keep_attention", Dense, "aot_eager")
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]


@pytest.mark.parametrize(("policy", "again"), [("none", 0), ("keep_attention", 3), ("block", 7)])
def test_compiled_products_that_no_gradient_needs_are_not_computed_again(policy: Recompute, again: int) -> None:
    """With attention kept, gradients need the output projection and the factors of the feed-forward network."""
    products = 0

    def counting(graph: torch.fx.GraphModule, _: Any) -> Any:
        def run(*inputs: Tensor) -> Any:
            nonlocal products
            products += sum(node.target is torch.ops.aten.mm.default for node in graph.graph.nodes)
            return graph.forward(*inputs)

        return make_boxed_func(run)

    # The partitioner of inductor.
    options = {"fw_compiler": counting, "bw_compiler": counting, "partition_fn": min_cut_rematerialization_partition}
    train_step(policy, Dense, aot_autograd(**options))
    # Seven forward; backward two for each, gradients of weights and inputs.
    assert products == CONFIG.num_hidden_layers * (3 * 7 + again)


@pytest.mark.parametrize("policy", POLICIES)
def test_compiled_no_more_is_kept(policy: Recompute) -> None:
    """But parameters, which a graph takes as inputs."""
    _, plain = train_step(policy, Dense)
    _, compiled = train_step(policy, Dense, "aot_eager")
    assert compiled <= plain + sum(p.numel() for p in Llama(CONFIG, Dense).parameters())


@pytest.mark.parametrize("policy", POLICIES)
def test_the_state_dict_is_the_same(policy: Recompute) -> None:
    llama = Llama(CONFIG, Dense)
    names = list(llama.state_dict())
    recompute_in_backward(llama, policy, every=2)
    compile_around_attention(llama, backend="eager")
    residual_in_autocast(llama)
    assert list(llama.state_dict()) == names


class Stream:
    """A model and the dtypes of its residual stream, collected as it runs."""

    def __init__(self, *, in_autocast: bool) -> None:
        torch.manual_seed(0)
        self.llama = Llama(CONFIG, Dense)
        self.llama.init_weights()
        if in_autocast:
            residual_in_autocast(self.llama)
        self.dtypes: list[torch.dtype] = []
        for module in (*self.llama.blocks, self.llama.model.norm):
            module.register_forward_pre_hook(lambda _, args: self.dtypes.append(args[0].dtype))
        self.ids = torch.randint(64, (2, 100))

    def logits(self, autocast: torch.dtype | None) -> Tensor:
        self.dtypes.clear()
        with torch.no_grad(), torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
            return self.llama(self.ids)


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_the_residual_stream_has_the_dtype_of_autocast_where_asked(autocast: torch.dtype) -> None:
    plain, changed = Stream(in_autocast=False), Stream(in_autocast=True)
    low = changed.logits(autocast)
    assert changed.dtypes == [autocast] * (CONFIG.num_hidden_layers + 1)
    plain_low = plain.logits(autocast)
    assert plain.dtypes == [torch.float32] * (CONFIG.num_hidden_layers + 1)
    assert torch.equal(changed.logits(None), plain.logits(None)), "without autocast nothing may change"
    exact = plain.llama.double()(plain.ids)
    error, plain_error = ((found - exact).norm() / exact.norm() for found in (low, plain_low))
    # Every sum of the stream is rounded, as every product already was: two of each in a block.
    assert plain_error < error < 3 * plain_error


def test_norms_compute_in_float32_whatever_the_stream() -> None:
    norm = Llama(CONFIG, Dense).model.norm
    torch.nn.init.uniform_(norm.weight, 0.5, 2.0)
    x = 3 * torch.randn(5, CONFIG.hidden_size)
    for dtype in (torch.float32, torch.bfloat16):
        low = x.to(dtype)
        exact = low.double() * (low.double().square().mean(-1, keepdim=True) + norm.eps).rsqrt() * norm.weight.double()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = norm(low)
        assert found.dtype == dtype
        # Rounded once, at the end: half of the last bit.
        torch.testing.assert_close(found.double(), exact, rtol=torch.finfo(dtype).eps * 0.51 + 1e-6, atol=0)
