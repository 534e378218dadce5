"""The prediction of memory against runs of Lightning's loop that really allocate it."""

import gc
import weakref
from functools import partial
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader

from muse_kernels.attention.checks import HAS_TRITON
from muse_lightning.attention import AttentionStrategy, Dense, Muse, SlidingWindow, SpatialBlocks
from muse_lightning.errors import UserError
from muse_lightning.model import load_preset
from muse_lightning.training.memory import StepMemory, _fused_norms, step_memory
from muse_lightning.training.module import LanguageModel

BATCH_SIZE, SEQ_LEN = 2, 384
far_muse = partial(Muse, chunk=64, query_cluster=16, key_cluster=16, exact_below=64, top_k=2)
LEVERS: list[dict[str, Any]] = [
    {},
    {"recompute": "block"},
    {"recompute": "keep_attention"},
    {"recompute": "block", "recompute_every": 2},
    {"recompute": "block", "mlp_tiles": 4},
    {"recompute": "keep_attention", "offload": True},
    {"mlp_tiles": 4, "loss_chunk": 64},
    {"exact_heads": 2, "recompute": "keep_attention"},
]
COMPILED: list[dict[str, Any]] = [
    {"compiled": True},
    {"compiled": True, "recompute": "keep_attention"},
    {"compiled": True, "recompute": "block", "recompute_every": 2},
    {"compiled": True, "mlp_tiles": 4},
]
SHORT = [",".join(f"{name}={value}" for name, value in levers.items()) or "none" for levers in LEVERS]
within_a_tenth, within_a_hundredth = partial(pytest.approx, rel=0.1), partial(pytest.approx, rel=0.01)


def a_model(attention: type[AttentionStrategy] = Dense, layers: int = 3, **options: Any) -> LanguageModel:
    config = load_preset("demo", num_hidden_layers=layers)
    return LanguageModel(config, attention, **({"loss_chunk": 256, "warmup_steps": 0} | options))


def predicted(model: LanguageModel, **options: Any) -> StepMemory:
    sizes = {
        "batch_size": BATCH_SIZE,
        "seq_len": SEQ_LEN,
        "accumulate": 1,
        "precision": "32-true",
        "device_type": "cpu",
    }
    return step_memory(model, **(sizes | options))


def train(
    model: LanguageModel, accumulate: int, precision: str, *callbacks: Callback, accelerator: str = "cpu"
) -> None:
    """Two optimizer steps."""
    trainer = L.Trainer(
        accelerator=accelerator,
        devices=1,
        max_steps=2,
        accumulate_grad_batches=accumulate,
        precision=precision,
        callbacks=list(callbacks),
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    batch = {name: torch.randint(300, (BATCH_SIZE, SEQ_LEN)) for name in ("input_ids", "labels")}
    trainer.fit(model, DataLoader([batch] * 2 * accumulate, batch_size=None))


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("levers", LEVERS, ids=SHORT)
def test_against_the_allocator(levers: dict[str, Any], accumulate: int) -> None:
    """Every allocation of the processor's allocator, those inside operations too, from the model's weights on. In
    float32: products of half precision take buffers on a processor that a GPU does not need."""
    gc.collect()  # what other tests left: it would be freed while this one counts
    model = a_model(**levers)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        train(model, accumulate, "32-true")
    assert profiler.profiler is not None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    assert len(events) > 1000
    assert predicted(model, accumulate=accumulate).total == within_a_hundredth(peak)


class Alive(TorchDispatchMode):
    """Bytes of all storages that operations returned and somebody still holds; their most."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.device.type == "cpu":
                storage = leaf.untyped_storage()
                if storage.data_ptr() not in self.sizes:
                    self.sizes[storage.data_ptr()] = storage.nbytes()
                    weakref.finalize(storage, self.sizes.pop, storage.data_ptr(), None)
        self.peak = max(self.peak, sum(self.sizes.values()))
        return result


@pytest.mark.parametrize("levers", LEVERS, ids=SHORT)
def test_muse_against_storages_that_are_alive(levers: dict[str, Any]) -> None:
    """What its reference takes inside is no part of the prediction, which is for kernels."""
    model = a_model(far_muse, **levers)
    with Alive() as alive:
        train(model, 2, "bf16-mixed")
    assert predicted(model, accumulate=2, precision="bf16-mixed").total == within_a_hundredth(alive.peak)


def test_weights_moments_and_gradients() -> None:
    """A step begins without gradients; a later micro-batch has those of the first."""
    model = a_model(recompute="block", loss_chunk=16, mlp_tiles=8)
    weights = 4 * sum(parameter.numel() for parameter in model.parameters())
    single, several = (predicted(model, accumulate=count) for count in (1, 2))
    assert (single.parameters, single.optimizer) == within_a_hundredth((weights, 2 * weights))
    assert several.phase == "backward"
    assert several.gradients == within_a_hundredth(weights)
    assert single.total < several.total
    assert single.total == sum(single.parts.values())
    half = predicted(model, precision="bf16-true")
    assert (half.parameters, half.optimizer) == within_a_hundredth((weights / 2, weights))
    muon = a_model(optimizer="muon")
    of_blocks = 4 * sum(p.numel() for p in muon.llama.model.layers.parameters() if p.ndim == 2)
    assert predicted(muon).optimizer == 2 * weights - of_blocks
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fused_norm_keeps_its_input_and_a_number_a_token(dtype: torch.dtype) -> None:
    x = torch.randn(2, 5, 16, dtype=dtype, requires_grad=True)
    norm = nn.RMSNorm(16)
    expected = norm(x)
    kept: list[Tensor] = []
    with _fused_norms(), torch.autograd.graph.saved_tensors_hooks(lambda y: kept.append(y) or y, lambda y: y):
        out = norm(x)
    assert (out.shape, out.dtype) == (expected.shape, expected.dtype)
    assert [tuple(tensor.shape) for tensor in kept] == [(2, 5, 16), (16,), (2, 5)]
    out.sum().backward()
    assert norm.weight.grad is not None
    assert torch.equal(norm(x), expected)


def test_on_a_simulated_gpu_what_is_on_the_host_does_not_count() -> None:
    """Two blocks' inputs of six are on the device; the peak is in the backward pass of the last."""
    options = {"recompute": "block", "layers": 6, "loss_chunk": 64}
    without, with_offload = (
        predicted(a_model(**options, offload=offload), seq_len=2048, accumulate=2, device_type="cuda")
        for offload in (False, True)
    )
    hidden = BATCH_SIZE * 2048 * load_preset("demo").hidden_size * 4
    assert without.phase == with_offload.phase == "backward"
    assert without.total - with_offload.total == pytest.approx(4 * hidden, rel=0.02)


def test_the_workspace_of_attention_counts_while_it_runs() -> None:
    """At the peak of a model that is little else than attention."""
    config = load_preset("demo", num_hidden_layers=1, num_attention_heads=48, intermediate_size=8)
    model = LanguageModel(config, Dense, loss_chunk=64, warmup_steps=0, recompute="block")
    on_cpu, on_gpu = (predicted(model, device_type=device, seq_len=2048) for device in ("cpu", "cuda"))
    assert (on_cpu.phase, on_gpu.phase) == ("backward", "backward")
    assert on_gpu.backward - on_cpu.backward == pytest.approx(BATCH_SIZE * 48 * 2048 * 32 * 4, rel=0.15)


@pytest.mark.parametrize(
    "levers", [{}, {"recompute": "keep_attention", "recompute_every": 2}, {"mlp_tiles": 2}], ids=str
)
def test_what_is_compiled_keeps_less_where_it_keeps_everything(levers: dict[str, Any]) -> None:
    options = {"layers": 4, "loss_chunk": 64, **levers}
    plain, compiled = (
        predicted(a_model(compiled=compiled, **options), device_type="cuda", seq_len=512, precision="bf16-mixed")
        for compiled in (False, True)
    )
    assert compiled.forward < 0.9 * plain.forward
    assert (compiled.parameters, compiled.optimizer) == (plain.parameters, plain.optimizer)


@pytest.mark.skipif(not HAS_TRITON, reason="no kernels to ask for")
def test_kernels_may_be_asked_for_by_name() -> None:
    attention = partial(Muse, chunk=64, query_cluster=16, key_cluster=16, exact_below=64, top_k=2)
    for exact_heads in (0, 2):
        auto, named = (
            predicted(
                a_model(partial(attention, implementation=name), exact_heads=exact_heads),
                device_type="cuda",
                seq_len=512,
            )
            for name in ("auto", "triton")
        )
        assert named == auto


def test_a_large_model_takes_no_memory_to_predict() -> None:
    model = LanguageModel(load_preset("8b"), Muse)
    memory = step_memory(model, batch_size=1, seq_len=65536, accumulate=1, precision="bf16-mixed")
    assert memory.parameters == 8_030_261_248 * 4  # the published number of parameters of Llama 3.1 8B
    assert memory.forward > 100 * 1024**3
    assert not torch.cuda.is_initialized()


class Reading(Dense):
    """Reads a value."""

    def forward(self, q: Tensor, *args: Any, **options: Any) -> Tensor:
        return super().forward(q, *args, **options) * (1.0 if q.sum().item() > 0 else 2.0)


@pytest.mark.parametrize("attention", [SlidingWindow, SpatialBlocks], ids=["SlidingWindow", "SpatialBlocks"])
@pytest.mark.parametrize("device_type", ["cuda", "cpu"])
def test_other_strategies(attention: type[AttentionStrategy], device_type: str) -> None:
    memory = predicted(a_model(attention, 1), device_type=device_type, seq_len=8192)
    assert memory.total > memory.parameters + memory.optimizer


@torch.library.custom_op("muse_tests::opaque", mutates_args=())
def opaque(x: Tensor) -> Tensor:
    """Does not say what it returns."""
    return x.clone()


class Opaque(Dense):
    """Calls it."""

    def forward(self, q: Tensor, *args: Any, **options: Any) -> Tensor:
        return super().forward(opaque(q), *args, **options)


@pytest.mark.parametrize("attention", [Reading, Opaque], ids=["Reading", "Opaque"])
def test_a_strategy_that_needs_content_is_named(attention: type[AttentionStrategy]) -> None:
    name = attention.__name__
    with pytest.raises(UserError, match=f"memory cannot be predicted, for {name} does not run on tensors without"):
        predicted(a_model(attention))


@pytest.mark.gpu
@pytest.mark.parametrize("attention", [Dense, Muse], ids=["dense", "muse"])
@pytest.mark.parametrize("levers", [*LEVERS, *COMPILED], ids=str)
def test_against_a_gpu(levers: dict[str, Any], attention: type[AttentionStrategy]) -> None:
    """A model of 75M parameters at 32,768 tokens; PyTorch's count of its allocator."""
    model = LanguageModel(load_preset("75m"), attention, warmup_steps=0, **levers)
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()  # what a failed test holds
    trainer = L.Trainer(
        accelerator="gpu",
        devices=1,
        max_steps=2,
        precision="bf16-mixed",
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    batch = {name: torch.randint(300, (1, 32768)) for name in ("input_ids", "labels")}
    trainer.fit(model, DataLoader([batch] * 2, batch_size=None))
    memory = step_memory(model, batch_size=1, seq_len=32768, accumulate=1, precision="bf16-mixed")
    assert memory.total == within_a_tenth(torch.cuda.max_memory_allocated() - before)
