"""What each head's approximation costs: against a model in which that head alone is replaced, from outside."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from muse_lightning.attention import Dense, Muse
from muse_lightning.compare.blocks import read_blocks
from muse_lightning.measure.attention_error import errors_by_head
from muse_lightning.model import Llama
from tests.compare.conftest import CONFIG, LAYERS, SEQ_LEN
from tools.head_rise import Heads, main

KV_HEADS = CONFIG.num_key_value_heads
OPTIONS: dict[str, Any] = {
    "chunk": 16,
    "query_cluster": 8,
    "key_cluster": 4,
    "top_k": 1,
    "candidates": 2,
    "exact_below": 16,
}
Batches = list[dict[str, Tensor]]


@pytest.fixture
def batches(dataset: Path) -> Batches:
    read = read_blocks(dataset, "val", SEQ_LEN, 2, document_mask=False, vocab_size=264)
    return [{"input_ids": batch["input_ids"], "labels": batch["labels"]} for batch in read.batches]


def loss(model: Llama, batches: Batches, change: Callable[[int, Tensor, Tensor], Tensor]) -> float:
    """With what `change` makes of each layer's exact outputs and MuSe's, [B, H, N, D]."""

    def hook(layer: int) -> Callable[..., Tensor]:
        return lambda _, inputs, options, out: change(layer, out, Muse(layer, **OPTIONS)(*inputs, **options))

    model.set_attention(Dense)
    hooks = [
        block.self_attn.attention.register_forward_hook(hook(layer), with_kwargs=True)
        for layer, block in enumerate(model.blocks)
    ]
    with torch.no_grad():
        losses = [
            torch.nn.functional.cross_entropy(model(batch["input_ids"]).flatten(0, 1), batch["labels"].flatten()).item()
            for batch in batches
        ]
    for each in hooks:
        each.remove()
    return sum(losses) / len(losses)


def moved(layer: int, head: int, share: float) -> Callable[[int, Tensor, Tensor], Tensor]:
    """By a share of the way from exact attention to MuSe, in one key-value head."""
    group = CONFIG.num_attention_heads // KV_HEADS
    is_head = torch.zeros(CONFIG.num_attention_heads, 1, 1)
    is_head[head * group : (head + 1) * group] = share
    return lambda of, exact, muse: exact + is_head * (muse - exact) if of == layer else exact


@pytest.mark.parametrize("layer", range(LAYERS))
@pytest.mark.parametrize("head", range(KV_HEADS))
def test_one_head_alone(llama: Llama, batches: Batches, layer: int, head: int) -> None:
    base = loss(llama, batches, lambda _, exact, __: exact)
    wanted = loss(llama, batches, moved(layer, head, 1.0)) - base
    slightly = (loss(llama, batches, moved(layer, head, 0.01)) - loss(llama, batches, moved(layer, head, -0.01))) / 0.02
    heads = Heads(llama, batches, OPTIONS)
    exact = heads.nats(torch.ones(heads.shape, dtype=torch.bool))
    assert exact.mean().item() == pytest.approx(base, abs=1e-5)
    assert heads.rises(exact)[layer, head].item() == pytest.approx(wanted, abs=1e-5)
    assert abs(slightly) > 1e-4
    assert heads.foretold()["gradient"][layer, head].item() == pytest.approx(slightly, rel=0.05, abs=1e-4)


def test_what_the_error_adds(llama: Llama, batches: Batches) -> None:
    heads = Heads(llama, batches[:1], OPTIONS)
    found = heads.foretold()
    chosen_by = errors_by_head(llama, batches[0]["input_ids"])
    torch.testing.assert_close(found["of layer"], chosen_by.double(), rtol=1e-4, atol=0)
    added: list[Tensor] = []
    first = llama.blocks[0].self_attn.o_proj.register_forward_hook(lambda _, __, out: added.append(out))
    heads.nats(torch.ones(heads.shape, dtype=torch.bool))
    first.remove()
    stream = llama.model.embed_tokens(batches[0]["input_ids"]) + added[0]
    ratio = (added[0].square().sum() / stream.square().sum()).double()
    torch.testing.assert_close(found["of stream"][0], found["of layer"][0] * ratio, rtol=1e-4, atol=0)


@pytest.mark.parametrize("exact_layers", [[], [0]])
def test_the_report(
    folder: Path,
    dataset: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    exact_layers: list[int],
) -> None:
    out = tmp_path / "heads.json"
    main(
        [
            str(folder),
            str(dataset),
            str(out),
            f"--seq_len={SEQ_LEN}",
            "--blocks=2",
            "--exact_layers",
            *map(str, exact_layers),
            "--counts",
            "1",
            "--muse",
            json.dumps(OPTIONS),
        ]
    )
    found = json.loads(out.read_text())
    printed = capsys.readouterr().out
    for name in ("relative", "of layer", "of stream", "gradient", "rise"):
        values = torch.tensor(found["heads"][name])
        assert values.shape == (LAYERS, KV_HEADS)
        is_exact = torch.tensor(found["choices"][f"1 by {name}"]["exact"])
        assert is_exact[exact_layers].all()
        values[exact_layers] = -torch.inf
        is_exact[exact_layers] = 0
        assert is_exact.flatten().argmax() == values.flatten().argmax()
        assert is_exact.sum() == 1
        assert f"1 by {name} " in printed
    assert min(map(min, found["heads"]["relative"] + found["heads"]["of layer"])) > 0
    every, both_layers = found["choices"]["none"]["rise"], found["choices"]["first and last layer"]["rise"]
    assert every != 0
    assert both_layers == pytest.approx(0, abs=1e-6)  # of two layers
