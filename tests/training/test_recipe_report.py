"""What `muse info` says of a recipe."""

import re

from muse_lightning.attention import Muse
from muse_lightning.model import load_preset
from muse_lightning.training.module import LanguageModel
from muse_lightning.training.recipe_report import recipe_report


def test_report_of_a_recipe() -> None:
    report = recipe_report(
        LanguageModel(load_preset("1b"), Muse, exact_layers=(0, -1)),
        batch_size=2,
        seq_len=65536,
        accumulate=4,
        precision="bf16-mixed",
        has_documents=False,
    ).splitlines()
    assert report[0] == "parameters: 1,235,814,400"  # as published for Llama 3.2 1B
    assert report[1] == "attention: Muse(chunk=2048, top_k=12), Dense in layers 0 and 15"
    assert report[2] == "tokens per step and device: 524,288 = 2 x 65,536 x 4 accumulated"
    sizes = dict(line.strip().split(": ") for line in report[4:])
    assert sizes["parameters"] == "4.60 GiB"
    assert sizes["optimizer"] == "9.21 GiB"
    assert list(sizes)[1:] == ["parameters", "optimizer", "gradients", "forward", "loss", "backward"]


def test_flops_of_a_recipe_are_those_of_its_documents() -> None:
    """Up to 7 chunks a row is exact, packed documents up to 2."""
    model = LanguageModel(load_preset("1b"), Muse)
    packed, whole = (
        recipe_report(
            model,
            batch_size=1,
            seq_len=8192,
            accumulate=1,
            precision="bf16-mixed",
            has_documents=has_documents,
        ).splitlines()[3]
        for has_documents in (True, False)
    )
    flops, dense = re.findall(r"\d\.\d+e\+\d+", whole)
    assert flops == dense
    assert float(re.findall(r"\d\.\d+e\+\d+", packed)[0]) < float(dense)
