"""All default callbacks together, and ContextWarmup: a fit writes every tag of docs/training.md, and no other."""

import re
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import LearningRateMonitor
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from muse_lightning.callbacks import DEFAULT_CALLBACKS, ContextWarmup
from muse_lightning.measure.device_peak import half_precision_peak
from muse_lightning.numerics.guard import NumericsGuard
from tests.tiny import VOCAB, TinyData, batches, tiny_model, tiny_muse, tiny_trainer

DOCUMENTATION = Path(__file__).parents[2] / "docs" / "training.md"
GPU_ONLY = {
    "throughput/device/mfu",
    "throughput/device/mfu_attention",
    "throughput/device/mfu_dense_equivalent",
    "memory/reserved_gib",
}


def documented_tags():
    """The first column of the table of tags, with {a,b} written out."""
    tags = set()
    for cell in re.findall(r"^\| `([a-z]+[/-][^`]*)`", DOCUMENTATION.read_text(), flags=re.MULTILINE):
        before, _, rest = cell.partition("{")
        names, _, after = rest.partition("}")
        tags |= {before + name + after for name in names.split(",")}
    return tags


def written_tags(folder, accelerator, precision):
    trainer = tiny_trainer(
        folder,
        accelerator=accelerator,
        precision=precision,
        max_steps=2,
        val_check_interval=2,
        gradient_clip_val=1.0,
        callbacks=[
            LearningRateMonitor("step"),
            NumericsGuard(),
            ContextWarmup(1, start=24),
            *(callback() for callback in DEFAULT_CALLBACKS),
        ],
    )
    # GPU kernels take heads of multiples of 8.
    model = tiny_model(config={"head_dim": 8}, attention=tiny_muse, exact_heads=1)
    trainer.fit(model, TinyData(batches(2), batches(1), token_bytes=torch.ones(VOCAB, dtype=torch.long)))
    events = EventAccumulator(trainer.logger.log_dir)
    events.Reload()
    found = {*events.Tags()["scalars"], *events.Tags()["images"]} - {"epoch"}
    return {
        re.sub("^(lr-|muse/relative_error_layer_|muse/exact_heads_layer_|val/loss_by_position/).*", r"\1*", tag)
        for tag in found
    }


def test_the_documentation_lists_tags():
    assert len(documented_tags()) == 30


def test_every_tag_on_a_processor(tmp_path):
    assert written_tags(tmp_path, "cpu", "32-true") == documented_tags() - GPU_ONLY


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "16-mixed"])
def test_every_tag_on_a_gpu(tmp_path, precision):
    expected = documented_tags()
    if half_precision_peak(torch.cuda.get_device_name()) is None:
        expected = {tag for tag in expected if "mfu" not in tag}
    assert written_tags(tmp_path, "gpu", precision) == expected
