"""Heads that a setting has exact are those that a training would choose before its first step."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from muse_lightning.attention import Dense, Muse, SlidingWindow
from muse_lightning.attention.partly_exact import PartlyExact, spread_heads
from muse_lightning.callbacks import ExactHeads
from muse_lightning.compare.blocks import Blocks, read_blocks
from muse_lightning.compare.exact_heads import with_chosen_heads
from muse_lightning.compare.measuring import measure
from muse_lightning.compare.settings import Grid, Setting, make_settings
from muse_lightning.data.batches import Batch
from muse_lightning.model import Llama, LlamaConfig
from muse_lightning.training.module import LanguageModel
from tests.compare.conftest import CONFIG, KV_HEADS, LAYERS, MUSE, SEQ_LEN
from tests.tiny import TinyData, tiny_trainer

GRID = Grid(
    chunk=(16,), query_cluster=(8,), key_cluster=(4,), top_k=(1, 3), exact_layers=((), (-1,)), exact_heads=(0, 1, 2)
)


@pytest.fixture
def several() -> list[Setting]:
    return make_settings(MUSE, 12, None, GRID, LAYERS, KV_HEADS, exact_heads=2)


def spread(setting: Setting) -> dict[int, tuple[int, ...]]:
    exact_layers = setting.exact_layer_numbers(LAYERS)
    return spread_heads(setting.exact_heads, exact_layers=exact_layers, num_layers=LAYERS, num_kv_heads=KV_HEADS)


def in_training(llama: Llama, blocks: Blocks, setting: Setting, folder: Path) -> dict[int, tuple[int, ...]]:
    """What the callback chooses before the first step on that block."""
    alone = make_settings(MUSE, 12, None, GRID, LAYERS, KV_HEADS)
    attention = {str(each.recipe): each.attention for each in alone if not each.exact_layers}[str(setting.recipe)]
    model = LanguageModel(
        llama.config, attention, setting.exact_layers, setting.exact_heads, learning_rate=1e-9, seq_len=SEQ_LEN
    )
    model.configure_model()
    model.llama.load_state_dict(llama.state_dict())
    tiny_trainer(folder, callbacks=[ExactHeads()], max_steps=1).fit(model, TinyData([blocks.other]))
    return {strategy.layer_idx: strategy.heads for strategy in model.partly_exact}


def test_they_are_those_of_a_training(llama: Llama, blocks: Blocks, several: list[Setting], tmp_path: Path) -> None:
    chosen = [each for each in with_chosen_heads(llama, blocks.other, several) if each.exact_heads]
    assert len(chosen) == 8  # three rows, and of the grid eight but one that is a row and two without MuSe
    for number, setting in enumerate(chosen):
        assert setting.heads == in_training(llama, blocks, setting, tmp_path / str(number)), setting.name
    # Not where they were before they were chosen.
    assert sum(each.heads != spread(each) for each in chosen) > 2


def test_they_do_not_depend_on_other_settings(llama: Llama, blocks: Blocks, several: list[Setting]) -> None:
    together = {each.name: each.heads for each in with_chosen_heads(llama, blocks.other, several)}
    backwards = {each.name: each.heads for each in with_chosen_heads(llama, blocks.other, several[::-1])}
    alone = {each.name: with_chosen_heads(llama, blocks.other, [each])[0].heads for each in several}
    assert together == backwards == alone
    assert len(set(map(str, together.values()))) > 3
    assert type(llama.blocks[0].self_attn.attention) is Dense


def test_only_what_is_not_exact_has_them(llama: Llama, blocks: Blocks, several: list[Setting]) -> None:
    found = {each.name: each for each in with_chosen_heads(llama, blocks.other, several)}
    assert found["Muse"] == several[1]
    both = found["top_k 3, exact_layers [-1], exact_heads 1"]
    first, last = (both.attention(layer) for layer in range(LAYERS))
    assert type(last) is Dense
    assert isinstance(first, PartlyExact)
    assert isinstance(first.others, Muse)
    assert (first.others.options["top_k"], first.layer_idx) == (3, 0)
    assert {0: first.heads} == both.heads
    for each in (both, found["Muse; 2 heads exact"]):
        assert each.elsewhere is not None
        assert type(each.elsewhere(1)) is Muse


def test_documents_are_told_apart(llama: Llama, blocks: Blocks, several: list[Setting], tmp_path: Path) -> None:
    row = {name: value for name, value in blocks.other.items() if name != "cu_seqlens"}
    cuts = (torch.tensor([0, cut, SEQ_LEN], dtype=torch.int32) for cut in range(20, 80, 10))

    def chosen_on(batch: Batch) -> dict[str, dict[int, tuple[int, ...]]]:
        return {each.name: dict(each.heads) for each in with_chosen_heads(llama, batch, several)}

    packed = next(batch for cut in cuts if chosen_on(batch := {**row, "cu_seqlens": cut}) != chosen_on(row))
    setting = next(each for each in several if chosen_on(packed)[each.name] != chosen_on(row)[each.name])
    assert chosen_on(packed)[setting.name] == in_training(llama, replace(blocks, other=packed), setting, tmp_path)


def test_they_are_chosen_on_the_block_for_it(llama: Llama, dataset: Path, several: list[Setting]) -> None:
    everything = read_blocks(dataset, "val", SEQ_LEN, 10**6, document_mask=False, vocab_size=264)
    several = [several[0], *(each for each in several if each.exact_heads == 2)]

    def heads_on(batch: Batch) -> list[object]:
        return [each.heads for each in with_chosen_heads(llama, batch, several)]

    first, *rest = everything.batches
    other = next(batch for batch in rest if heads_on(batch) != heads_on(first))
    found = measure(
        llama,
        replace(everything, batches=[first], indices=[0], other=other),
        several,
        detailed_blocks=1,
        gradients=False,
        loss_chunk=32,
        instruments=None,
    )
    assert [each.setting.heads for each in found] == heads_on(other)


def test_exact_is_what_the_model_means(blocks: Blocks) -> None:
    model = Llama(LlamaConfig(**(vars(CONFIG) | {"sliding_window": 20})), Dense)
    model.init_weights(torch.Generator().manual_seed(1))
    settings = make_settings(MUSE, 12, 20, None, LAYERS, KV_HEADS, exact_heads=1)
    strategy = with_chosen_heads(model, blocks.other, settings)[4].attention(0)
    assert isinstance(strategy, PartlyExact)
    assert isinstance(strategy.exact, SlidingWindow)
    assert strategy.exact.window == 20
