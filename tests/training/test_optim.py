"""Schedules at their corners and against their definition; who decays; a resumed optimizer obeys the recipe."""

import itertools
import math

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from muse_lightning.attention import Dense
from muse_lightning.errors import UserError
from muse_lightning.model import Llama, load_preset
from muse_lightning.training.optim import (
    apply_hyperparameters,
    learning_rate_factor,
    numbered_by_model,
    parameter_groups,
)


def factors(schedule, max_steps, warmup_steps=0, min_lr_ratio=0.0, decay_fraction=0.25):
    factor = learning_rate_factor(
        schedule,
        max_steps=max_steps,
        warmup_steps=warmup_steps,
        min_lr_ratio=min_lr_ratio,
        decay_fraction=decay_fraction,
    )
    return [factor(step) for step in range(max_steps + 1)]


def test_cosine():
    found = factors("cosine", 12, warmup_steps=4, min_lr_ratio=0.2)
    assert found[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert found[8] == pytest.approx(0.2 + 0.8 * (1 + math.cos(math.pi / 2)) / 2)
    assert found[12] == pytest.approx(0.2)
    assert all(a > b for a, b in itertools.pairwise(found[4:]))


def test_wsd():
    found = factors("wsd", 16, warmup_steps=2, min_lr_ratio=0.5)
    assert found[:2] == [0.5, 1.0]
    assert found[2:13] == [1.0] * 11
    assert found[13:] == pytest.approx([0.875, 0.75, 0.625, 0.5])


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_run_shorter_than_its_warmup_is_all_warmup(schedule):
    assert factors(schedule, 2, warmup_steps=10)[:2] == [0.1, 0.2]


def test_no_decay_stays_at_the_peak():
    assert factors("wsd", 5, decay_fraction=0.0)[:5] == [1.0] * 5


def test_unknown_length_of_training():
    with pytest.raises(UserError, match=r"trainer.max_steps is -1; .* at least 1"):
        factors("cosine", -1)


def test_norms_and_biases_do_not_decay():
    biases = dict.fromkeys(("attention_bias", "attention_output_bias", "mlp_bias", "qk_norm"), True)
    llama = Llama(load_preset("demo", **biases), Dense)
    decaying, fixed = parameter_groups(llama, 0.1)
    assert (decaying["weight_decay"], fixed["weight_decay"]) == (0.1, 0.0)
    # Per layer seven matrices with a bias each and four norms; the tied embedding once; the final norm.
    assert len(decaying["params"]) == 4 * 7 + 1
    assert len(fixed["params"]) == 4 * (7 + 4) + 1
    assert all(parameter.ndim == 1 for parameter in fixed["params"])


def test_frozen_parameters_are_left_out():
    model = nn.Linear(2, 3)
    model.weight.requires_grad_(False)
    assert [len(group["params"]) for group in parameter_groups(model, 0.1)] == [0, 1]


def test_hyperparameters_of_the_recipe_win_over_a_restored_state():
    def optimizer_and_scheduler(lr, decay):
        optimizer = torch.optim.AdamW(parameter_groups(model, decay), lr=lr, betas=(0.9, 0.95), eps=1e-8)
        return optimizer, LambdaLR(optimizer, lambda step: 1 / (1 + step))

    model = nn.Linear(2, 3)
    old, old_scheduler = optimizer_and_scheduler(lr=0.1, decay=0.5)
    model(torch.ones(2)).sum().backward()
    for _ in range(3):
        old.step()
        old_scheduler.step()
    new, new_scheduler = optimizer_and_scheduler(lr=0.2, decay=0.25)
    new.load_state_dict(old.state_dict())
    new_scheduler.load_state_dict(old_scheduler.state_dict())

    lines = apply_hyperparameters(new_scheduler, 0.2, 0.25, (0.9, 0.95), 1e-8)

    assert lines == [
        "model.learning_rate: 0.1 in the checkpoint, 0.2 in this recipe, which wins",
        "model.weight_decay: 0.5 in the checkpoint, 0.25 in this recipe, which wins",
    ]
    assert [group["lr"] for group in new.param_groups] == [0.2 / 4] * 2
    assert [group["weight_decay"] for group in new.param_groups] == [0.25, 0.0]
    new.step()
    new_scheduler.step()
    assert [group["lr"] for group in new.param_groups] == pytest.approx([0.2 / 5] * 2)
    assert apply_hyperparameters(new_scheduler, 0.2, 0.25, (0.9, 0.95), 1e-8) == []


def test_a_state_is_numbered_by_the_model() -> None:
    """Every parameter's moments stand under its place in the model, and an optimizer of the same groups takes them."""
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 5))

    def adamw() -> torch.optim.AdamW:
        return torch.optim.AdamW(parameter_groups(model, 0.1), lr=1e-2)

    optimizer = adamw()
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    state = optimizer.state_dict()
    numbered = numbered_by_model(state, optimizer, model)
    parameters = list(model.parameters())
    assert sorted(numbered["state"]) == [0, 1, 2, 3]
    for place, values in numbered["state"].items():
        assert values["exp_avg"] is optimizer.state[parameters[place]]["exp_avg"]
    assert [group["params"] for group in numbered["param_groups"]] == [[0, 2], [1, 3]]
    again = adamw()
    again.load_state_dict(numbered)
    for parameter in parameters:
        torch.testing.assert_close(again.state[parameter], optimizer.state[parameter], rtol=0, atol=0)
