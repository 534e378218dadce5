"""The datasets that a recipe names: what is accepted, and each mistake in the recipe's own terms."""

import json
import shutil
from pathlib import Path

import pytest
from jsonargparse import ArgumentParser

from muse_lightning.data import TokenDataModule
from muse_lightning.data.card import read_card
from muse_lightning.data.prepared import MixtureEntry
from muse_lightning.data.sources import Folders
from muse_lightning.data.tokenizer import SpecialTokens
from muse_lightning.errors import UserError


def module(*entries: tuple[object, float], **arguments) -> TokenDataModule:
    mixture = [MixtureEntry(str(dataset), weight) for dataset, weight in entries]
    return TokenDataModule(mixture=mixture, **{"seq_len": 300, "batch_size": 2, **arguments})


def test_a_mixture_comes_from_yaml(prepared, other_prepared):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(TokenDataModule, "data", fail_untyped=True)
    text = (
        f"data: {{seq_len: 64, batch_size: 1, mixture: [{{dataset: {prepared}, weight: 0.8}}, "
        f"{{dataset: {other_prepared}, weight: 0.2}}]}}"
    )
    config = parser.parse_string(text)
    data = parser.instantiate(config).data
    assert [(dataset.name, dataset.weight) for dataset in data.datasets] == [
        (str(prepared), 0.8),
        (str(other_prepared), 0.2),
    ]
    assert parser.parse_string(parser.dump(config)) == config
    assert parser.parse_string("data: {dataset: s3://bucket/set, seq_len: 1, batch_size: 1}").data.dataset == (
        "s3://bucket/set"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, r"data.dataset: nothing found; give one dataset there, or several in data.mixture: \[{dataset"),
        ({"dataset": "a", "mixture": [MixtureEntry("b", 1)]}, r"data.dataset: also data.mixture found"),
        ({"mixture": []}, r"data.mixture: no dataset found"),
        (
            {"mixture": [MixtureEntry("a", 1), MixtureEntry("b", -1)]},
            r"data.mixture\[1\].weight: -1 found, a number of",
        ),
        ({"mixture": [MixtureEntry("a", float("nan"))]}, r"data.mixture\[0\].weight: nan found"),
        ({"mixture": [MixtureEntry("a", 0)]}, r"data.mixture: every weight is 0"),
        (
            {"mixture": [MixtureEntry("a", 1)], "sources": [Folders(Path("."))]},
            r"data.sources: given, but only data.dataset",
        ),
        (
            {"dataset": "s3://bucket/set", "sources": [Folders(Path("."))]},
            r"data.sources: given, but only data.dataset",
        ),
        ({"dataset": "a", "ranks_per_block": 0}, r"data.ranks_per_block: 0 found, at least 1"),
        ({"dataset": "a", "cache_bytes": 0}, r"data.cache_bytes: 0 found, at least 1"),
    ],
)
def test_mistakes_in_the_recipe(arguments, message):
    with pytest.raises(UserError, match=message):
        TokenDataModule(seq_len=64, batch_size=1, **arguments)


def test_datasets_that_do_not_go_together(prepared, other_prepared, tmp_path):
    copy = shutil.copytree(prepared, tmp_path / "copy")
    with pytest.raises(
        UserError, match=rf"data.mixture\[1\].dataset: {copy} holds the same as {prepared}; list it once"
    ):
        module((prepared, 1), (copy, 1)).setup("fit")
    with pytest.raises(UserError, match=rf"{tmp_path}/none is not a prepared dataset"):
        module((prepared, 1), (tmp_path / "none", 1)).setup("fit")
    card = json.loads((copy / "dataset.json").read_text())
    card["tokenizer"]["sha256"] = "0" * 64
    (copy / "dataset.json").write_text(json.dumps(card))
    own = read_card(other_prepared).tokenizer["sha256"][:12]
    different = (
        rf"data.mixture: prepared with different tokenizers: {other_prepared} with bytes \({own}\), {copy} with bytes "
        r"\(000000000000\); prepare all of them with one, as muse prepare --data.tokenizer=PATH"
    )
    with pytest.raises(UserError, match=different):
        module((other_prepared, 1), (copy, 1)).setup("fit")
    with pytest.raises(UserError, match=rf"data.special_tokens: end '<eos>' found, but {prepared} was prepared with"):
        module((prepared, 1), (other_prepared, 1), special_tokens=SpecialTokens(end="<eos>")).setup("fit")


def test_a_dataset_too_small_for_the_context_is_named(prepared, other_prepared):
    longest = {
        dataset: max(chunk.tokens for chunk in module((dataset, 1)).card.splits["train"].chunks)
        for dataset in (prepared, other_prepared)
    }
    short, long = sorted(longest, key=lambda dataset: longest[dataset])
    assert longest[short] < longest[long]
    seq_len = longest[long] - 1
    with pytest.raises(UserError, match=rf"split 'train' of {short} .* the largest that works is {longest[short] - 1}"):
        module((short, 1), (long, 1), seq_len=seq_len, batch_size=1).setup("fit")
    module((short, 0), (long, 1), seq_len=seq_len, batch_size=1)._check_split("train", 1)


def test_a_validation_too_short_for_the_context_says_what_makes_it_longer(prepared):
    seq_len = max(chunk.tokens for chunk in read_card(prepared).splits["val"].chunks)
    with pytest.raises(
        UserError,
        match=rf"split 'val' .* the largest that works is {seq_len - 1}, or prepare again with a larger data.val_fract",
    ):
        module((prepared, 1), seq_len=seq_len)._check_split("val", 1)


def test_damage_in_any_dataset_is_found(prepared, other_prepared, tmp_path):
    copy = shutil.copytree(other_prepared, tmp_path / "copy")
    (copy / "train" / "index.json").write_text("{}")
    with pytest.raises(UserError, match=r"copy/train/index.json is missing or damaged"):
        module((prepared, 1), (copy, 1)).setup("fit")
