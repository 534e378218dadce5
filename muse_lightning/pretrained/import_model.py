"""`muse import`: a pretrained model of Hugging Face's, to train on from or to use."""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from muse_lightning.errors import UserError
from muse_lightning.files import atomic_write, expand_home, new_directory
from muse_lightning.pretrained.hub import download_descriptions, download_weights, is_hub_id
from muse_lightning.pretrained.reference import ModelReference, model_shapes, open_model, read_hf_config
from muse_lightning.pretrained.tensors import HEAD
from muse_lightning.pretrained.tokenizer_files import TOKENIZER_FILE, check_vocabulary, folder_tokenizer
from muse_lightning.pretrained.write_model import DTYPES, DtypeName, check_room, write_model

RECIPE_FILE = "recipe.yaml"
_HEAD = """\
# Weights, architecture and tokenizer of {source}, to lay over a recipe: muse fit -c RECIPE -c THIS_FILE
"""
_WINDOW_HEAD = """\
# The model was trained with a sliding window. Over a recipe of Muse attention, remove `attention` to train with that.
"""


def import_model(source: str, *, output: Path, revision: str | None = None, dtype: DtypeName | None = None) -> None:
    """Bring a pretrained model into a folder, with an overlay for recipes that trains on from it.

    Llama, Mistral, Qwen2 and Qwen3 in Hugging Face's format are understood (docs/pretrained.md).

    Args:
        source: A folder, or the name of a model on the Hugging Face hub.
        output: The folder to make.
        revision: Branch, tag or commit on the hub; null: main.
        dtype: Of the weights; null: as they are stored.
    """
    origin = expand_home(source)
    is_here = origin.exists()
    if not is_here and not is_hub_id(source):
        raise UserError(f"source: {source} does not exist; expected a folder, or the name of a model on the hub")
    if is_here and revision is not None:
        raise UserError(f"revision: {revision} found, but {source} is a folder; a model on the hub has revisions")
    with new_directory(output, "output") as folder:
        model = open_model(origin if is_here else _download(source, revision, folder, dtype))
        write_model(model, folder, dtype)
        atomic_write(folder / RECIPE_FILE, recipe_overlay(model, source, folder, output.resolve()))
    print(f"{output}: written from {source}; train with: muse fit -c RECIPE -c {output / RECIPE_FILE}", file=sys.stderr)


def _download(source: str, revision: str | None, output: Path, dtype: DtypeName | None) -> Path:
    """A model of the hub. What its descriptions tell is checked before gigabytes are fetched."""
    found = download_descriptions(source, revision)
    config = read_hf_config(found)
    if (found / TOKENIZER_FILE).is_file():
        check_vocabulary(found / TOKENIZER_FILE, config)
    shapes = model_shapes(config)
    if config.tie_word_embeddings:
        del shapes[HEAD]
    # Of an unknown dtype the smallest that is accepted.
    itemsize = DTYPES[dtype or "float16"].itemsize
    check_room(itemsize * sum(shape.numel() for shape in shapes.values()), output)
    download_weights(source, found)
    return found


def recipe_overlay(model: ModelReference, source: str, copy: Path, output: Path) -> str:
    """YAML that makes a recipe train on from a model.

    Args:
        model: as it was opened.
        source: its name, for the head comment.
        copy: the folder that was made of it.
        output: where that will be.
    """
    config = model.config
    # As the recipes that continue training have it: the first layer, and as many heads as it has.
    heads = config.num_key_value_heads if config.num_hidden_layers > 2 else 0
    exact = {"exact_layers": [0], "exact_heads": heads}
    values: dict[str, Any] = {"model": {"config": asdict(config), **exact, "weights": str(output)}}
    window = config.sliding_window
    if window is not None:
        values["model"]["attention"] = {"class_path": "SlidingWindow", "init_args": {"window": window}}
    tokenizer = folder_tokenizer(copy, config)
    if tokenizer is None:
        print(f"{source} has no {TOKENIZER_FILE}: give data.tokenizer in the recipe", file=sys.stderr)
    else:
        values["data"] = {"tokenizer": str(output), "special_tokens": asdict(tokenizer.special_tokens)}
        if tokenizer.vocab_size > config.vocab_size:
            print(
                f"{source}: the tokenizer has too few tokens that stand for no text, and the model no rows to spare: "
                "set data.special_tokens to three of its tokens",
                file=sys.stderr,
            )
    head = _HEAD.format(source=source) + (_WINDOW_HEAD if window is not None else "")
    return head + yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
