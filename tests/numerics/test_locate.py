"""The first module whose output, or gradient there, is not finite, is named."""

import math

import pytest
from torch import nn

from muse_lightning.numerics.locate import Located, locating, not_finite
from tests.numerics.planting import Plant, modules_of, plant_in
from tests.tiny import batches, tiny_model


def look(plant: Plant | None, **options) -> Located:
    model = tiny_model(**options)
    model.configure_model()
    if plant is not None:
        plant_in(model, plant)
    with locating(model) as located:
        (model.total_nats(batches(1)[0]) / 96).backward()
    return located


@pytest.mark.parametrize("recompute", ["none", "block", "keep_attention"])
@pytest.mark.parametrize(
    "module",
    ["llama.model.embed_tokens", "llama.model.layers.0.self_attn.v_proj", "llama.model.layers.1.mlp.down_proj"],
)
def test_forward(module: str, recompute: str) -> None:
    assert look(Plant(module, value=math.inf), recompute=recompute).forward == module


def test_every_module_can_be_named() -> None:
    for module in modules_of(tiny_model()):
        # A network ends with its last product: what is put into the network's own output comes after that.
        assert look(Plant(module)).forward == module


@pytest.mark.parametrize("recompute", ["none", "block", "keep_attention"])
def test_backward(recompute: str) -> None:
    located = look(Plant("llama.model.layers.0.mlp.down_proj", "backward"), recompute=recompute)
    assert located.forward is None
    assert located.backward is not None
    # Between the gradient that was spoilt, on its way to the product, and the one before.
    assert located.backward.startswith("llama.model.layers.0.mlp")
    assert located.before_backward is not None


def test_nothing_is_found_where_nothing_is_and_no_hook_stays() -> None:
    assert vars(look(None)) | {"_hooked": None} == {
        "forward": None,
        "backward": None,
        "before_backward": "llama.model.embed_tokens",
        "_hooked": None,
    }
    module = nn.Sequential(nn.Linear(2, 2))
    with locating(module):
        assert module[0]._forward_hooks
    assert not module[0]._forward_hooks


def test_tensors_that_are_not_finite() -> None:
    module = nn.Linear(2, 2)
    assert not_finite(module.named_parameters()) == []
    nn.init.constant_(module.bias, math.inf)
    assert not_finite(iter([*module.named_parameters(), ("none", None)])) == ["bias"]
