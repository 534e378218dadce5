"""What each head's approximation costs: against a model in which that head alone is replaced, from outside."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from muse_lightning.attention import Dense, Muse
from muse_lightning.compare.blocks import read_blocks
from muse_lightning.measure.attention_error import errors_by_head
from muse_lightning.model import Llama
from tests.compare.conftest import CONFIG, LAYERS, SEQ_LEN
from tools import head_rise
from tools.head_rise import Heads, main, open_checked

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


def arguments(folder: Path, dataset: Path, out: Path, **options: Any) -> list[str]:
    """Of a command line that is accepted, but for `options`."""
    values = {"seq_len": [SEQ_LEN], "blocks": [2], "muse": [json.dumps(OPTIONS)]} | options
    return [str(folder), str(dataset), str(out)] + [
        text for name, each in values.items() for text in (f"--{name}", *map(str, each))
    ]


@pytest.mark.parametrize(("given", "exact_layers"), [([], []), ([0], [0]), ([-1], [1]), ([1, -1], [1])])
def test_the_report(
    folder: Path,
    dataset: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    given: list[int],
    exact_layers: list[int],
) -> None:
    out = tmp_path / "heads.json"
    main(arguments(folder, dataset, out, exact_layers=given, counts=[1]))
    found = json.loads(out.read_text())
    printed = capsys.readouterr().out
    assert found["exact_layers"] == exact_layers
    assert "relative: correlation with the rise " in printed
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


def test_one_block_has_no_standard_error(
    folder: Path, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(arguments(folder, dataset, tmp_path / "heads.json", counts=[1], blocks=[1]))
    choices = json.loads((tmp_path / "heads.json").read_text())["choices"]
    assert [each["standard_error"] for each in choices.values()] == [None] * len(choices)
    assert "nan" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("layers", "exact_layers", "counts"), [(5, [], [4, 8]), (5, [0], [4]), (4, [], [4]), (4, [0, -1], [])]
)
def test_counts_are_below_the_number_of_heads(
    tmp_path: Path,
    dataset: Path,
    monkeypatch: pytest.MonkeyPatch,
    layers: int,
    exact_layers: list[int],
    counts: list[int],
) -> None:
    config = replace(CONFIG, num_hidden_layers=layers)
    monkeypatch.setattr(head_rise, "open_model", lambda _: SimpleNamespace(config=config))
    given = arguments(Path(), dataset, tmp_path / "heads.json", exact_layers=exact_layers)
    options = head_rise.make_parser().parse_args(given)
    open_checked(options)
    assert options.counts == counts


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"exact_layers": [0, 2]}, "--exact_layers names layer 2; accepted: 0 to 1, or from the end -1 to -2"),
        ({"exact_layers": [-3]}, "--exact_layers names layer -3; accepted: 0 to 1, or from the end -1 to -2"),
        ({"exact_layers": [0, -1]}, "--exact_layers names every layer; at least one must be left"),
        ({"counts": [0]}, "--counts has 0; accepted: 1 to 4, the heads outside the exact layers"),
        ({"counts": [4, 5]}, "--counts has 5; accepted: 1 to 4, the heads outside the exact layers"),
        (
            {"counts": [3], "exact_layers": [-1]},
            "--counts has 3; accepted: 1 to 2, the heads outside the exact layers",
        ),
        ({"blocks": [0]}, "--blocks is 0; accepted: at least 1"),
        ({"seq_len": [0]}, "--seq_len is 0; accepted: at least 1"),
        ({"seq_len": [10**9]}, "seq_len: 1000000000 found; split 'val' of "),
        ({"muse": ["24"]}, "argument --muse: '24' found; a mapping expected, such as {top_k: 24}"),
        ({"muse": [""]}, "argument --muse: '' found; a mapping expected, such as {top_k: 24}"),
        ({"muse": ["{"]}, "argument --muse: while parsing a flow node expected the node content"),
        ({"muse": ["{topk: 24}"]}, "argument --muse: Muse.__init__() got an unexpected keyword argument 'topk'"),
        ({"muse": ["{top_k: -1}"]}, "argument --muse: Muse: top_k must be at least 0, got -1"),
        ({"muse": ["{top_k: many}"]}, "argument --muse: '<' not supported between instances of 'str' and 'int'"),
    ],
)
def test_an_option_that_cannot_be_used(
    folder: Path,
    dataset: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: dict[str, Any],
    said: str,
) -> None:
    assert said in refused(arguments(folder, dataset, tmp_path / "heads.json", **options), capsys)


def test_a_file_that_cannot_be_used(
    folder: Path, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, missing = tmp_path / "heads.json", tmp_path / "missing"
    for places, said in (
        ((missing, dataset, out), f"model: {missing}"),
        ((folder, missing, out), f"{missing}"),
        (
            (folder, dataset, missing / "heads.json"),
            f"OUT: {missing / 'heads.json'} found; expected a file in a folder",
        ),
        ((folder, dataset, tmp_path), f"OUT: {tmp_path} found; expected a file in a folder"),
    ):
        assert said in refused(arguments(*places), capsys)


def refused(args: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line, after the usage, that a command line is refused with."""
    with pytest.raises(SystemExit) as exit_:
        main(args)
    assert exit_.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    *usage, line = printed.err.splitlines()
    assert all(each.startswith(("usage: ", " ")) for each in usage)
    return line


def test_nothing_is_measured_before_arguments_are_checked(
    folder: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(head_rise, "Heads")
    monkeypatch.delattr(head_rise.ModelReference, "load")
    with pytest.raises(SystemExit):
        main(arguments(folder, dataset, tmp_path / "heads.json", counts=[0]))


def test_where_no_head_errs_nothing_is_told(
    folder: Path, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    muse = json.dumps(OPTIONS | {"exact_below": SEQ_LEN})
    main(arguments(folder, dataset, tmp_path / "heads.json", muse=[muse], counts=[1]))
    printed = capsys.readouterr().out
    assert printed.endswith(
        "\nno head errs: MuSe attends these blocks exactly (exact_below), and nothing can be told of heads\n"
    )
    assert "correlation" not in printed
