"""Folders of checkpoints whose content does not matter."""

from collections.abc import Iterable
from pathlib import Path

from muse_lightning.checkpoints.choice import step_path
from muse_lightning.checkpoints.manifest import Manifest
from muse_lightning.files import sha256_bytes


def put(folder: Path, step: int, loss: float | None = None) -> Path:
    """Add a checkpoint that is whole."""
    folder.mkdir(exist_ok=True)
    path = step_path(folder, step)
    content = f"checkpoint of step {step}".encode()
    path.write_bytes(content)
    Manifest(step, len(content), sha256_bytes(content), None, {} if loss is None else {"val/loss": loss}).write(path)
    return path


def damage(path: Path) -> Path:
    """Change one bit, which no size tells."""
    content = bytearray(path.read_bytes())
    content[3] ^= 1
    path.write_bytes(content)
    return path


def steps(folder: Path) -> list[int]:
    """Steps of which anything is there."""
    return sorted(_steps(folder.iterdir()))


def _steps(paths: Iterable[Path]) -> set[int]:
    return {int(path.name.split(".")[0].removeprefix("step=")) for path in paths}
