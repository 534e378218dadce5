"""Whole models, against transformers' own exact attention and against the operator itself."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from muse_kernels import muse_attention
from muse_lightning.drop_in import register_with_transformers
from tests.assertions import relative_error
from tests.drop_in.examples import (
    APPROXIMATE,
    BATCHES,
    LENGTH,
    MODELS,
    SIZES,
    TOLERANCE,
    Recorder,
    assert_same,
    make_model,
    run,
)

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("name", MODELS)
def test_logits_and_gradients_are_those_of_exact_attention(name: str, batch: dict[str, Any]) -> None:
    model = make_model(name)
    assert_same(run(model, "muse_exact", batch), run(model, "sdpa", batch))


@pytest.mark.parametrize("batch", [BATCHES["left"], BATCHES["packed"]], ids=["left", "packed"])
@pytest.mark.parametrize("name", ["llama", "qwen3-windows"])
def test_gradient_checkpointing_changes_nothing(name: str, batch: dict[str, Any]) -> None:
    model = make_model(name).train()
    for attention, reference in (("muse_exact", "sdpa"), ("muse", "muse")):
        model.gradient_checkpointing_disable()
        expected = run(model, reference, batch)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        assert_same(run(model, attention, batch), expected)


@pytest.mark.parametrize("name", ["llama", "qwen3-windows", "mistral-window"])
def test_autocast(name: str) -> None:
    model = make_model(name).float()
    with torch.autocast("cpu", torch.bfloat16):
        actual, expected = (run(model, attention, BATCHES["left"]) for attention in ("muse_exact", "sdpa"))
    assert relative_error(actual[0], expected[0]) < 0.03
    assert actual[0].dtype == expected[0].dtype
    assert all(torch.isfinite(gradient).all() for gradient in actual[1].values())


SPANS: dict[str, tuple[dict[str, Any], list[list[tuple[int, int]]]]] = {
    "plain": ({}, [[(0, 70)]]),
    "left": (BATCHES["left"], [[(9, 70)], [(40, 70)]]),
    "both": (BATCHES["both"], [[(0, 40)], [(5, 50)]]),
    "packed": (BATCHES["packed"], [[(0, 11), (11, 47), (47, 70)]]),
}
"""By batch, the documents of each row."""


@pytest.mark.parametrize(("batch", "rows"), SPANS.values(), ids=SPANS)
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "mistral", "mistral-wide-window"])
def test_every_layer_is_the_operator_on_each_document(
    name: str, batch: dict[str, Any], rows: list[list[tuple[int, int]]], recorder: Recorder
) -> None:
    model = make_model(name)
    run(model, "muse", batch)
    assert len(recorder) == SIZES["num_hidden_layers"]
    for call in list(recorder):
        inputs = [x.detach().requires_grad_() for x in (call.q, call.k, call.v)]
        out, _ = AttentionInterface()["muse"](call.module, *inputs, call.mask, **call.others)
        dout = torch.randn_like(out)
        gradients = torch.autograd.grad(out, inputs, dout)
        expected, exact = torch.zeros_like(out), torch.zeros_like(out)
        for row, spans in enumerate(rows):
            for start, end in spans:
                document = [x[row, None, :, start:end] for x in inputs]
                scale = {"softmax_scale": call.module.scaling, "implementation": "reference"}
                attended = muse_attention(*document, **APPROXIMATE, **scale)
                expected[row, start:end] = attended[0].transpose(0, 1)
                attended = muse_attention(*document, **(APPROXIMATE | {"exact_below": LENGTH}), **scale)
                exact[row, start:end] = attended[0].transpose(0, 1)
        torch.testing.assert_close(out, expected, **TOLERANCE)
        torch.testing.assert_close(call.out, expected, **TOLERANCE)
        torch.testing.assert_close(gradients, torch.autograd.grad(expected, inputs, dout), **TOLERANCE)
        assert relative_error(out, exact) > 1e-3  # the approximation has been at work


@pytest.mark.parametrize(("scaling", "softmax_scale"), [(0.7, 0.7), (None, 8**-0.5)])
def test_the_layers_scale_is_used(scaling: float | None, softmax_scale: float) -> None:
    layer = make_model("llama").model.layers[0].self_attn
    q, k, v = (torch.randn(1, heads, LENGTH, 8) for heads in (4, 2, 2))
    out, _ = AttentionInterface()["muse"](layer, q, k, v, None, scaling=scaling)
    torch.testing.assert_close(out.transpose(1, 2), muse_attention(q, k, v, **APPROXIMATE, softmax_scale=softmax_scale))


def test_a_window_is_exact_in_an_approximate_model() -> None:
    model = make_model("mistral-window")
    assert_same(run(model, "muse", BATCHES["both"]), run(model, "sdpa", BATCHES["both"]))


@pytest.mark.parametrize(
    "batch", [BATCHES["plain"], BATCHES["both"], BATCHES["packed"]], ids=["plain", "both", "packed"]
)
def test_exact_heads(batch: dict[str, Any]) -> None:
    """Each head is as if its attention were all heads', which share nothing."""
    model = make_model("llama", num_hidden_layers=4)
    register_with_transformers("muse_heads", **APPROXIMATE, exact_layers=(0,), exact_heads={1: [1], -1: [1], 3: [0]})
    is_exact = [[True, True], [False, True], [False, False], [True, True]]

    def composed(module: torch.nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **others: Any) -> Any:
        muse, exact = (
            AttentionInterface()[name](module, q, k, v, mask, **others)[0] for name in ("muse", "muse_exact")
        )
        of_query_heads = torch.tensor(is_exact[module.layer_idx]).repeat_interleave(2)
        return torch.where(of_query_heads[:, None], exact, muse), None

    AttentionInterface.register("muse_composed", composed)
    AttentionMaskInterface.register("muse_composed", AttentionMaskInterface()["muse_heads"])
    found, expected = (run(model, name, batch) for name in ("muse_heads", "muse_composed"))
    assert_same(found, expected)
    assert all(relative_error(found[0], run(model, name, batch)[0]) > 1e-3 for name in ("muse", "muse_exact"))


@pytest.mark.parametrize("name", ["mistral-window", "mistral-wide-window", "qwen2-windows"])
def test_exact_layers_have_the_window_of_the_model(name: str) -> None:
    model = make_model(name)
    register_with_transformers("muse_nowhere", **APPROXIMATE, exact_layers=(0, -1))
    assert_same(run(model, "muse_nowhere", BATCHES["both"]), run(model, "sdpa", BATCHES["both"]))


@pytest.mark.parametrize(
    "batch", [BATCHES["plain"], BATCHES["both"], BATCHES["packed"]], ids=["plain", "both", "packed"]
)
def test_exact_layers(batch: dict[str, Any]) -> None:
    model = make_model("llama", num_hidden_layers=3)
    register_with_transformers("muse_between", **APPROXIMATE, exact_layers=(0, -1))
    register_with_transformers("muse_nowhere", **APPROXIMATE, exact_layers=(0, 1, -1))

    layers = []

    def recorded(module: torch.nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **others: Any) -> Any:
        found = {
            name: AttentionInterface()[name](module, q, k, v, mask, **others)[0] for name in ("muse", "muse_exact")
        }
        out, weights = AttentionInterface()["muse_between"](module, q, k, v, mask, **others)
        same = [name for name, wanted in found.items() if relative_error(out, wanted) < 1e-9]
        assert same == ["muse" if module.layer_idx == 1 else "muse_exact"]
        layers.append(module.layer_idx)
        return out, weights

    AttentionInterface.register("muse_recorded", recorded)
    AttentionMaskInterface.register("muse_recorded", AttentionMaskInterface()["muse_between"])
    run(model, "muse_recorded", batch)
    assert layers == [0, 1, 2]
    assert_same(run(model, "muse_nowhere", batch), run(model, "sdpa", batch))


def test_a_saved_model_is_loaded_with_it(tmp_path: Path) -> None:
    model = make_model("qwen3")
    model.set_attn_implementation("muse")
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation="muse", dtype=torch.float64
    )
    assert loaded.config._attn_implementation == "muse"
    assert_same(run(loaded, "muse", BATCHES["left"]), run(model, "muse", BATCHES["left"]))


def test_nothing_but_torch_and_transformers_is_needed() -> None:
    blocked = ["lightning", "litdata", "jsonargparse", "tensorboard", "rich", "yaml", "triton"]
    script = (
        f"import sys; sys.modules.update(dict.fromkeys({blocked})); import muse_lightning.drop_in as drop_in; "
        "print(sorted({name.split('.')[1] for name in sys.modules if name.startswith('muse_lightning.')}))"
    )
    result = subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT, capture_output=True, text=True)
    assert result.stdout.strip() == "['attention', 'drop_in', 'errors']"


def test_the_documentations_lines_train(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    page = (ROOT / "docs" / "transformers.md").read_text(encoding="utf-8")
    (lines,) = re.findall(r"^```python\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)
    assert len(lines.splitlines()) <= 10
    make_model("qwen3").float().save_pretrained(tmp_path / "model")
    for old, new in {
        '"Qwen/Qwen3-0.6B-Base"': repr(str(tmp_path / "model")),
        '"out"': f"{str(tmp_path / 'out')!r}, use_cpu=True, disable_tqdm=True, report_to=[], logging_steps=1",
        "per_device_train_batch_size=1": "per_device_train_batch_size=1, max_steps=3",
        "chunk=2048": "chunk=16, query_cluster=4, key_cluster=4, exact_below=0",
        "top_k=12": "top_k=1",
    }.items():
        assert lines.count(old) == 1, old
        lines = lines.replace(old, new)
    ids = [torch.randint(64, (LENGTH,)) for _ in range(6)]
    namespace: dict[str, Any] = {"dataset": [{"input_ids": x, "labels": x} for x in ids]}
    exec(lines, namespace)
    losses = [entry["loss"] for entry in namespace["trainer"].state.log_history if "loss" in entry]
    assert len(losses) == 3
    assert torch.tensor(losses).isfinite().all()
    assert namespace["model"].config._attn_implementation == "muse"
