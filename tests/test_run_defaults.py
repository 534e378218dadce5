"""What a run has beside what its recipe names."""

import json
import re
from pathlib import Path

import pytest

from tests.recipe import Muse


@pytest.mark.parametrize(
    ("name", "values"),
    [("ContextWarmup", ["--trainer.callbacks.steps=2"]), ("DurableCheckpoint", []), ("NumericsGuard", [])],
)
def test_ours_twice_are_refused_before_anything_is_made(muse: Muse, name: str, values: list[str]) -> None:
    flags = [f"--trainer.callbacks+={name}", *values]
    code, _, err = muse.with_recipe("fit", *flags, *flags)
    assert code == 2
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert line.startswith(f"error: trainer.callbacks: {name} is given 2 times; accepted: once.")
    assert muse.versions() == []
    assert not Path("dataset").exists()


@pytest.mark.parametrize(
    ("filename", "inserts", "saved"),
    [
        ("{step}-{val/loss:.2f}", True, None),
        ("best/{step}", False, None),
        ("step={step}-loss={val/loss:.1f}", False, r"step=2-loss=\d\.\d\.ckpt"),
        ("{step}", True, r"step=2\.ckpt"),
    ],
)
def test_checkpoints_are_saved_where_a_resume_looks(
    muse: Muse, filename: str, inserts: bool, saved: str | None
) -> None:
    arguments = {"monitor": "val/loss", "filename": filename, "auto_insert_metric_name": inserts}
    chosen = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": arguments}
    flags = [f"--trainer.callbacks={json.dumps([chosen])}", "--trainer.val_check_interval=2"]
    if saved is None:
        message = muse.error("fit", "--config", "recipe.yaml", *flags)
        assert message.startswith(f"trainer.callbacks: ModelCheckpoint.filename is {filename!r}, whose / makes folders")
        assert not Path("dataset").exists()
        return
    assert muse.with_recipe("fit", *flags)[0] == 0
    names = [path.name for path in Path("runs/tiny/version_0/checkpoints").glob("*.ckpt")]
    assert len(names) == 1
    assert re.fullmatch(saved, names[0])
    code, _, err = muse.with_recipe("fit", *flags, "--trainer.max_steps=4", "--resume")
    assert code == 0, err
    assert "steps: 2 to 4, " in err


def test_lightnings_may_watch_two_things(muse: Muse) -> None:
    flags = [
        flag
        for monitor in ("train/loss", "train/grad_norm")
        for flag in ("--trainer.callbacks+=EarlyStopping", f"--trainer.callbacks.monitor={monitor}")
    ]
    code, _, err = muse.with_recipe("fit", *flags)
    assert code == 0, err


def test_defaults_give_way_to_the_users_own(muse: Muse) -> None:
    flags = ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.filename=mine"]
    assert muse.with_recipe("fit", *flags, "--trainer.enable_progress_bar=false")[0] == 0
    saved = sorted(path.name for path in Path("runs/tiny/version_0/checkpoints").iterdir())
    assert saved == ["mine.ckpt", "mine.manifest.json"]
    assert muse.with_recipe("fit", "--trainer.logger=false", "--trainer.enable_checkpointing=false")[0] == 0
    assert sorted(path.name for path in Path("runs/tiny/version_1").iterdir()) == [
        "config.yaml",
        "environment.json",
        "ledger",
        "lock",
    ]
