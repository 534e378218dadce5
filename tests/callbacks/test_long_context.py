"""`muse validate` writes every tag that docs/evaluation.md lists, and no other; two ranks add up to one."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from muse_lightning.attention import Dense
from muse_lightning.callbacks import ContextGain, IdentifierRecall, NeedleRetrieval
from tests.distributed.validate_tiny import Data, N, batch, repository
from tests.recipe import Muse
from tests.tiny import scalars, tiny_model, tiny_muse, tiny_trainer

ROOT = Path(__file__).parents[2]
DOCUMENTATION = ROOT / "docs" / "evaluation.md"
LONGER = (
    "--data.seq_len=512",
    "--model.config.max_position_embeddings=512",
    "--data.val_fraction=0.5",
    "--data.test_fraction=0",
)
"""The recipe with contexts in which there is something to find."""


@pytest.fixture
def muse(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Muse:
    """Eight repositories of three files, each of which uses what the two others define."""
    monkeypatch.chdir(tmp_path)
    muse = Muse(tmp_path, capsys)
    for folder in [*(tmp_path / "source").iterdir(), *(tmp_path / "source" / f"more_{i}" for i in range(4))]:
        folder.mkdir(exist_ok=True)
        for number in range(3):
            others = "".join(f"    {folder.name}_function_{i}(only_here_{number})\n" for i in range(3) if i != number)
            lines = "".join(f"    {chr(97 + line)} = {line * number}\n" for line in range(20))
            text = f"def {folder.name}_function_{number}():\n{others}{lines}"
            (folder / f"module_{number}.py").write_text(text)
    return muse


def documented_tags() -> set[str]:
    """The first column of the table of tags, with {a,b} written out."""
    tags = set()
    for cell in re.findall(r"^\| `(val/[^`]*)`", DOCUMENTATION.read_text(), flags=re.MULTILINE):
        before, _, rest = cell.partition("{")
        names, _, after = rest.partition("}")
        tags |= {before + name + after for name in names.split(",")}
    return tags


@pytest.mark.parametrize("document_mask", ["true", "false"])
def test_muse_validate_writes_every_tag(muse: Muse, document_mask: str) -> None:
    future = ("--trainer.callbacks+=FutureGain", "--trainer.callbacks.tokens=2")
    code, out, err = muse.with_recipe("validate", *LONGER, f"--data.document_mask={document_mask}", *future)
    assert code == 0, err
    events = EventAccumulator("runs/tiny/version_0")
    events.Reload()
    found = {*events.Tags()["scalars"], *events.Tags()["images"]}
    long_context = {
        re.sub(r"((depth|count|accuracy|nats)_)\d+$", r"\1*", tag)
        for tag in found
        if re.match("val/(loss_short|loss_long|context_gain|needle|identifier|future)", tag)
    }
    assert len(documented_tags()) == 20
    assert long_context == documented_tags()
    assert "val/needle_gain" in out
    assert "val/identifier_count_256" in out


def test_fit_has_them_by_name(muse: Muse) -> None:
    names = ("ContextGain", "NeedleRetrieval", "IdentifierRecall")
    flags = [*(f"--trainer.callbacks+={name}" for name in names), "--trainer.callbacks.min_distance=8"]
    code, out, err = muse.with_recipe("fit", *LONGER, *flags, "--trainer.max_steps=1", "--trainer.val_check_interval=1")
    assert code == 0, err
    assert "val/context_gain" in out
    assert "val/needle_gain" in out
    assert "val/identifier_accuracy " in out


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true", "16-mixed"])
@pytest.mark.parametrize("attention", [Dense, tiny_muse], ids=["dense", "muse"])
def test_on_a_gpu(tmp_path: Path, attention: Any, precision: str) -> None:
    """Against the same weights on a processor, in float32."""

    def logged(accelerator: str, precision: Any) -> dict[str, float]:
        torch.manual_seed(0)
        sizes = {"vocab_size": 259, "max_position_embeddings": N, "head_dim": 16}
        model = tiny_model(config=sizes, attention=attention, seq_len=N)
        model.configure_model()  # on the CPU, so that both have the same weights
        callbacks = [ContextGain(), NeedleRetrieval(needle_tokens=16, min_share=0.6), IdentifierRecall(min_distance=8)]
        trainer = tiny_trainer(
            tmp_path / accelerator, accelerator=accelerator, precision=precision, callbacks=callbacks
        )
        val = [batch(repository("load_all", 3), repository("save", 2))]
        trainer.validate(model, Data([], val), verbose=False)
        return {tag: points[0][1] for tag, points in scalars(trainer).items() if tag.startswith("val/")}

    expected, found = logged("cpu", "32-true"), logged("gpu", precision)
    assert found.keys() == expected.keys()
    for tag in ("val/needle_rows", "val/identifier_count", "val/identifier_count_control"):
        assert found[tag] == expected[tag] > 0, tag
    tolerance = 1e-3 if precision == "32-true" else 0.1
    for tag in ("val/context_gain", "val/needle_gain", "val/identifier_nats", "val/identifier_nats_control"):
        assert found[tag] == pytest.approx(expected[tag], abs=tolerance), tag


@pytest.mark.multi_process
def test_two_ranks_add_up(tmp_path: Path) -> None:
    """Each with half of the batches; and both with all of them, as ranks that share a sequence have."""

    def logged(devices: int, ranks_per_block: int) -> dict[str, list[tuple[int, float]]]:
        folder = tmp_path / f"{devices}-{ranks_per_block}"
        folder.mkdir()
        numbers = (str(devices), str(ranks_per_block))
        command = [sys.executable, "-m", "tests.distributed.validate_tiny", str(folder), *numbers]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, done.stderr
        found: dict[str, Any] = torch.load(folder / "result.pt")
        return found

    one, two, sharing = logged(1, 1), logged(2, 1), logged(2, 2)
    assert one.keys() == two.keys() == sharing.keys()
    assert {
        "val/context_gain",
        "val/needle_gain",
        "val/identifier_nats",
        "val/future_gain",
        "val/loss_short",
        "val/loss_long",
    } <= one.keys()
    for tag, points in one.items():
        (_, value), (_, other), (_, shared) = *points, *two[tag], *sharing[tag]
        # The same sums in another order, in float64.
        assert other == pytest.approx(value, rel=1e-6, abs=1e-9), tag
        assert shared == pytest.approx(value, rel=1e-6, abs=1e-9), tag
    assert abs(dict(one["val/future_gain"])[0]) > 1e-3
    assert dict(one["val/needle_rows"])[0] == 3.0
    assert dict(one["val/identifier_count"])[0] == 4.0
