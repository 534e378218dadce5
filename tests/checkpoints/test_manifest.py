"""A manifest tells a whole checkpoint from every kind of damaged one."""

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from muse_lightning.checkpoints.manifest import Manifest, manifest_path, problem_of
from muse_lightning.files import sha256_bytes

CONTENT = bytes(range(256)) * 40


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "step=5.ckpt"
    path.write_bytes(CONTENT)
    Manifest(5, len(CONTENT), sha256_bytes(CONTENT), {"train": {"seq_len": 8}}, {"val/loss": 2.5}).write(path)
    return path


def test_what_is_written_is_read(checkpoint: Path) -> None:
    assert manifest_path(checkpoint) == checkpoint.with_name("step=5.manifest.json")
    manifest = Manifest.read(checkpoint)
    assert manifest == Manifest(5, len(CONTENT), sha256_bytes(CONTENT), {"train": {"seq_len": 8}}, {"val/loss": 2.5})
    manifest.with_metrics({"val/loss": 2.0, "val/bpb": 1.0}).write(checkpoint)
    assert Manifest.read(checkpoint).metrics == {"val/loss": 2.0, "val/bpb": 1.0}
    assert problem_of(checkpoint) is None
    assert sorted(path.name for path in checkpoint.parent.iterdir()) == ["step=5.ckpt", "step=5.manifest.json"]


def flip(path: Path) -> None:
    path.write_bytes(CONTENT[:5000] + bytes([CONTENT[5000] ^ 1]) + CONTENT[5001:])


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (flip, "its content has changed since it was saved: SHA-256 differs"),
        (lambda path: path.write_bytes(CONTENT[:9000]), "it has 9,000 bytes, its manifest says 10,240"),
        (lambda path: path.write_bytes(CONTENT[:9000] + bytes(1240)), "SHA-256 differs"),
        (lambda path: path.unlink(), "No such file or directory"),
        (lambda path: manifest_path(path).unlink(), "it has no manifest, so it was not saved to its end"),
        (lambda path: manifest_path(path).write_text('{"step": 5, "size_by'), "its manifest is damaged"),
        (lambda path: manifest_path(path).write_bytes(bytes(300)), "its manifest is damaged"),
        (lambda path: manifest_path(path).write_text("[]"), "its manifest is damaged"),
        (lambda path: manifest_path(path).write_text('{"format_version": 1, "step": -1}'), "its manifest is damaged"),
        (lambda path: manifest_path(path).write_text('{"format_version": 2}'), "format_version 2; accepted: 1"),
    ],
    ids=["flipped", "cut", "zero-tail", "gone", "no-manifest", "cut-manifest", "zeros", "list", "fields", "newer"],
)
def test_damage_is_named(checkpoint: Path, damage: Callable[[Path], object], problem: str) -> None:
    damage(checkpoint)
    found = problem_of(checkpoint)
    assert found is not None
    assert problem in found


def test_every_bit_of_a_manifest_counts(checkpoint: Path) -> None:
    """A step of 5 is a step of 7 by one bit: the run would go on from there, or be done."""
    path = manifest_path(checkpoint)
    content, written = path.read_bytes(), Manifest.read(checkpoint)
    for place in range(8 * len(content)):
        damaged = bytearray(content)
        damaged[place // 8] ^= 1 << place % 8
        path.write_bytes(damaged)
        with suppress(ValueError):
            # Such as 1e-05 for 1E-05.
            assert Manifest.read(checkpoint) == written, bytes(damaged)


def test_a_manifest_of_before_is_read(checkpoint: Path) -> None:
    written = Manifest.read(checkpoint)
    put(checkpoint)
    assert Manifest.read(checkpoint) == written


@pytest.mark.parametrize(
    "field",
    [{"step": "5"}, {"size_bytes": -1}, {"sha256": 3}, {"data": []}, {"metrics": {"val/loss": "2"}}, {"extra": 1}],
    ids=str,
)
def test_fields_of_other_types_are_damage(checkpoint: Path, field: dict[str, object]) -> None:
    put(checkpoint, **field)
    assert problem_of(checkpoint) == "its manifest is damaged"


def put(checkpoint: Path, **fields: object) -> None:
    """Change fields of the manifest, which has no SHA-256 of its own then."""
    found = json.loads(manifest_path(checkpoint).read_text()) | fields
    del found["manifest_sha256"]
    manifest_path(checkpoint).write_text(json.dumps(found))


def test_keys_that_are_numbers(checkpoint: Path) -> None:
    replace(Manifest.read(checkpoint), data={"train": {2: (1, 2), 10: None}}).write(checkpoint)
    assert problem_of(checkpoint) is None
    assert Manifest.read(checkpoint).data == {"train": {"2": [1, 2], "10": None}}
