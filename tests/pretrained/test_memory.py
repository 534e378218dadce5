"""Import and export hold a shard of the output in memory, never the model: a child process measures its own peak."""

import json
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from muse_lightning.model import LlamaConfig, load_preset
from muse_lightning.model.hf import config_to_hf
from muse_lightning.pretrained.reference import model_shapes

MIB = 1 << 20
CHILD = """
import resource, sys, torch
from muse_lightning.cli import main
from muse_lightning.pretrained import export_model, import_model, write_model
write_model.SHARD_BYTES = int(sys.argv[1])
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
for command in sys.argv[2:]:
    assert main(command.split("|")) == 0
print(1024 * (peak() - before))
"""


def write_zeros(folder: Path, config: LlamaConfig, shard_bytes: int, dtype: str = "BF16") -> int:
    """A checkpoint of nothing but zeros, in sparse files; its size in bytes."""
    itemsize = {"BF16": 2, "F32": 4}[dtype]
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config_to_hf(config)))
    files: list[dict[str, torch.Size]] = [{}]
    shapes = model_shapes(config)
    if config.tie_word_embeddings:
        del shapes["lm_head.weight"]
    for name, shape in shapes.items():
        if itemsize * sum(other.numel() for other in (*files[-1].values(), shape)) > shard_bytes:
            files.append({})
        files[-1][name] = shape
    places = {}
    for number, shard in enumerate(files):
        file = f"model-{number + 1:05d}-of-{len(files):05d}.safetensors"
        header, end = {}, 0
        for name, shape in shard.items():
            size = itemsize * shape.numel()
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + size]}
            end += size
            places[name] = file
        text = json.dumps(header).encode()
        with (folder / file).open("wb") as opened:
            opened.write(struct.pack("<Q", len(text)) + text)
            opened.truncate(8 + len(text) + end)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return itemsize * sum(shape.numel() for shape in shapes.values())


def peak_of(commands: list[list[str]], shard_bytes: int) -> int:
    """Bytes that commands take in a process of their own, beyond what its imports take."""
    lines = ["|".join(command) for command in commands]
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(shard_bytes), *lines], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout.splitlines()[-1])


def test_import_and_export_hold_one_shard(tmp_path: Path) -> None:
    """170 MB of weights in tensors of at most 16 MB and output shards of 16 MB."""
    config = LlamaConfig(8192, 1024, 4096, 5, 16, 16, 1024)
    size = write_zeros(tmp_path / "zeros", config, 60 * MIB)
    assert size > 170 * MIB
    commands = [
        ["import", str(tmp_path / "zeros"), "--output", str(tmp_path / "imported")],
        ["export", str(tmp_path / "imported"), "--output", str(tmp_path / "exported"), "--dtype=float16"],
    ]
    assert peak_of(commands, 16 * MIB) < 64 * MIB


def test_a_tensor_is_cast_by_rows(tmp_path: Path) -> None:
    """256 MiB in float32, of which 128 are left."""
    write_zeros(tmp_path / "zeros", LlamaConfig(1 << 17, 512, 512, 1, 4, 4, 1024), 1 << 30, "F32")
    command = ["import", str(tmp_path / "zeros"), "--output", str(tmp_path / "imported"), "--dtype=bfloat16"]
    peak = peak_of([command], 16 * MIB)
    shutil.rmtree(tmp_path / "imported")  # pytest keeps what tests leave
    assert peak < 210 * MIB


@pytest.mark.slow
@pytest.mark.exhaustive
def test_8b_within_4_gb(tmp_path: Path) -> None:
    """Llama 3.1 8B's shapes, 16 GB: needs room for as much on the disk."""
    size = write_zeros(tmp_path / "zeros", load_preset("8b"), 5 * 10**9)
    assert size == 2 * 8_030_261_248
    try:
        peak = peak_of([["import", str(tmp_path / "zeros"), "--output", str(tmp_path / "imported")]], 1 << 30)
    finally:
        shutil.rmtree(tmp_path / "imported", ignore_errors=True)  # pytest keeps what tests leave
    assert peak < 3 * 10**9  # the process itself takes less than 1 GB before
