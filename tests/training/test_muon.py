"""Muon and AdamW as one optimizer: bit for bit what both do by themselves, and refused where matrices are in parts."""

from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
)
from torch.optim import AdamW, Muon

from muse_lightning.errors import UserError
from muse_lightning.training.muon import check_strategy
from muse_lightning.training.optim import make_optimizer
from tests.tiny import tiny_model
from tests.training.by_hand import OPTIONS, by_hand, by_lightning


def two_optimizers(model):
    options = {"lr": OPTIONS["learning_rate"], "weight_decay": OPTIONS["weight_decay"]}
    layers, embedding = model.llama.model.layers, model.llama.model.embed_tokens.weight
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": [embedding]}, {"params": vectors, "weight_decay": 0.0}]
    matrices = [p for p in layers.parameters() if p.ndim == 2]
    return (
        Muon(matrices, momentum=0.95, adjust_lr_fn="match_rms_adamw", **options),
        AdamW(groups, betas=OPTIONS["betas"], eps=OPTIONS["eps"], fused=True, **options),
    )


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_steps_equal_those_of_both_by_hand(tmp_path, precision):
    found = by_lightning(tmp_path, "muon", precision)
    expected = by_hand("muon", precision, two_optimizers)
    assert found.keys() == expected.keys()
    for name, parameter in expected.items():
        assert torch.equal(found[name], parameter), name


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_steps_on_a_gpu_equal_those_of_both_by_hand(tmp_path, precision):
    found = by_lightning(tmp_path, "muon", precision, "cuda")
    expected = by_hand("muon", precision, two_optimizers, "cuda")
    for name, parameter in expected.items():
        # Sums of gradients over tokens may be in any order, and Newton-Schulz runs in bf16.
        torch.testing.assert_close(found[name], parameter, atol=1e-3, rtol=0, msg=name)


def test_what_a_closure_returns_is_returned_with_gradients_enabled():
    model = tiny_model(optimizer="muon")
    model.configure_model()
    optimizer = make_optimizer(model.parameter_groups(), fused=True)
    with torch.no_grad():
        assert optimizer.step(torch.is_grad_enabled) is True
    assert not optimizer.state, "parameters without a gradient were stepped"


def test_groups_that_a_loaded_state_brings_are_those_that_are_stepped():
    model = tiny_model(optimizer="muon")
    model.configure_model()
    optimizer = make_optimizer(model.parameter_groups(), fused=True)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.load_state_dict(optimizer.state_dict())
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert len(optimizer.state) == len(before)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_embedding_and_head_are_not_muons(tied):
    model = tiny_model(optimizer="muon", config={"tie_word_embeddings": tied})
    muon, matrices, vectors = model.parameter_groups()
    assert len(muon["params"]) == 2 * 7
    assert matrices["params"] == [
        model.llama.model.embed_tokens.weight,
        *([] if tied else [model.llama.lm_head.weight]),
    ]
    assert all(parameter.ndim == 1 for parameter in vectors["params"])
    assert (muon["momentum"], vectors["weight_decay"]) == (0.95, 0.0)


@pytest.mark.parametrize("kind", [FSDPStrategy, ModelParallelStrategy, DeepSpeedStrategy])
def test_refused_where_matrices_may_be_sharded(kind):
    with pytest.raises(UserError) as error:
        check_strategy(kind.__new__(kind))
    assert str(error.value) == (
        f"model.optimizer is muon, which needs whole matrices; trainer.strategy {kind.__name__} may shard them; "
        "accepted: one device or ddp"
    )


def test_a_training_asks():
    trainer = SimpleNamespace(strategy=FSDPStrategy.__new__(FSDPStrategy))
    muon, adamw = tiny_model(optimizer="muon"), tiny_model()
    muon.trainer = adamw.trainer = trainer
    with pytest.raises(UserError, match="FSDPStrategy"):
        muon.setup("fit")
    muon.setup("validate")
    adamw.setup("fit")


@pytest.mark.parametrize("kind", [SingleDeviceStrategy, DDPStrategy])
def test_accepted_where_they_are_whole(kind):
    check_strategy(kind.__new__(kind))
