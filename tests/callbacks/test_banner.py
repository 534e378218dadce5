"""What a fit prints before its first step, against the recipe and the model it is about."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from muse_lightning.callbacks import banner as under_test
from muse_lightning.callbacks.banner import ASSUMED_UTILISATION, banner
from muse_lightning.errors import UserError
from tests.recipe import Muse
from tests.tiny import tiny_model, tiny_muse, tiny_trainer


def test_a_fit_says_what_it_is_about_to_do(muse: Muse) -> None:
    levers = ["--model.recompute=block", "--model.recompute_every=2", "--model.mlp_tiles=4"]
    code, _, err = muse.with_recipe("fit", "--trainer.accumulate_grad_batches=3", *levers)
    assert code == 0, err
    said = dict(line.split(": ", 1) for line in err.splitlines() if ": " in line)
    assert said["model"].startswith("9,808 parameters, 2 layers, fresh weights")
    assert said["attention"].startswith("Muse(chunk=")
    assert "), by plain PyTorch" in said["attention"]
    assert said["attention"].endswith("around it not compiled; recompute=block, recompute_every=2, mlp_tiles=4")
    assert said["context"] == "32 tokens, 2 rows per device and micro-batch; documents told apart"
    assert said["steps"] == "0 to 2, 192 tokens each, 384 in all"
    assert re.match(r"about 0\.[1-9] MiB per device", said["memory"])
    assert "dataset" in err


def test_a_resumed_fit_counts_what_is_left(muse: Muse) -> None:
    muse.with_recipe("fit")
    checkpoint = "--ckpt_path=runs/tiny/version_0/checkpoints/step=2.ckpt"
    code, _, err = muse.with_recipe(
        "fit", checkpoint, "--trainer.max_steps=5", "--model.attention={class_path: Dense, init_args: {}}"
    )
    assert code == 0, err
    assert "steps: 2 to 5, 64 tokens each, 192 in all" in err
    assert "attention: Dense, by PyTorch SDPA" in err
    assert "layers, from runs/tiny/version_0/checkpoints/step=2.ckpt\n" in err
    # 9,808 parameters without 5 norms of 16; 16.5 keys for each of 32 queries in 4 heads of 4 and 2 layers.
    weights, attention = 6 * (9808 - 5 * 16), 12 * 4 * 4 * 2 * 16.5
    assert f"work: {weights + attention:.2e} FLOPs per token" in err
    assert f"{attention / (weights + attention):.0%} of it attention; in all 100% of exact attention's" in err


@pytest.mark.parametrize(
    ("flags", "is_said"),
    [
        (["accumulate_grad_batches=2", "val_check_interval=5"], True),
        (["accumulate_grad_batches=2", "val_check_interval=4"], False),
        (["val_check_interval=5", "limit_val_batches=0"], False),
        (["val_check_interval=00:01:00:00"], False),
        (["val_check_interval=5", "callbacks+=StopAfter", "callbacks.step=1"], False),
    ],
    ids=["never", "at-the-end", "off", "by-the-clock", "stopped"],
)
def test_a_fit_that_ends_before_its_first_validation_says_so(
    muse_with_dataset: Muse, flags: list[str], is_said: bool
) -> None:
    code, _, err = muse_with_dataset.with_recipe("fit", *(f"--trainer.{flag}" for flag in flags))
    assert code == 0, err
    line = "validation: none, the training ends before the 5 batches of trainer.val_check_interval"
    assert err.splitlines().count(line) == is_said


def test_a_fit_that_does_not_validate_its_end_says_so(muse_with_dataset: Muse) -> None:
    """Also one that is resumed, from what it has saved between validations."""
    flags = ["--trainer.val_check_interval=2", "--trainer.check_val_every_n_epoch=null"]
    said = (
        "validation: the last one is after step {} of {}; a trainer.val_check_interval of {} batches has one at the end"
    )
    for max_steps, resume, expected in (
        (3, [], [said.format(2, 3, 3)]),
        (4, ["--resume"], []),
        (7, ["--resume"], [said.format(6, 7, 1)]),
    ):
        code, _, err = muse_with_dataset.with_recipe("fit", *flags, f"--trainer.max_steps={max_steps}", *resume)
        assert code == 0, err
        assert [line for line in err.splitlines() if line.startswith("validation: ")] == expected


def test_layers_of_each_kind_of_attention_are_named(muse: Muse) -> None:
    code, _, err = muse.with_recipe("fit", "--model.exact_layers=[0,-1]", "--model.config.num_hidden_layers=3")
    assert code == 0, err
    assert "attention: Dense, Muse(" in err
    assert ") in layer 1, by plain PyTorch" in err


def test_the_expected_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """On a GPU whose peak is known: the work over a share of that peak."""
    monkeypatch.setattr(under_test, "half_precision_peak", lambda _: 1e9)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")
    trainer = SimpleNamespace(
        max_steps=100,
        global_step=40,
        world_size=2,
        callbacks=[],
        strategy=SimpleNamespace(root_device=torch.device("cuda", 0)),
    )
    lines = list(under_test._steps(trainer, 1000, 6e6))
    seconds = 60 * 1000 * 6e6 / (1e9 * ASSUMED_UTILISATION * 2)
    assert lines[-1].startswith(f"time: about 0:{seconds // 60:02.0f}:{seconds % 60:02.0f} at 40%")


def test_without_a_data_module(tmp_path: Path) -> None:
    """Lightning's own loops may be given bare loaders."""
    trainer = tiny_trainer(tmp_path)
    lines = banner(trainer, tiny_model(attention=tiny_muse))
    assert [line.split(":")[0] for line in lines] == ["model", "attention", "device"]


def test_memory_that_cannot_be_predicted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(*_: object, **__: object) -> None:
        raise UserError("memory cannot be predicted")

    monkeypatch.setattr(under_test, "step_memory", fail)
    assert list(under_test._memory(tiny_trainer(tmp_path), tiny_model(), 1, 48)) == [
        "memory: memory cannot be predicted"
    ]
