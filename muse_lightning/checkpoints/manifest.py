"""The manifest beside a checkpoint, written last: a checkpoint without a fitting one does not exist.

`step=N.manifest.json` says of `step=N.ckpt` how many bytes it has and their SHA-256, the optimizer step, where training
stood in the data, and what was measured there; and the SHA-256 of all that, for a flipped bit may leave a manifest that
is as good as any, of another step.
"""

import json
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from muse_lightning.errors import reason_of
from muse_lightning.files import atomic_file, sha256_bytes, sha256_file

FORMAT_VERSION = 1
"""Of checkpoint and manifest; it is in both."""
CHECKPOINT_SUFFIX = ".ckpt"
MANIFEST_SUFFIX = ".manifest.json"
_OWN_HASH = "manifest_sha256"
"""Of all other fields, as JSON with sorted keys. Manifests of before it was introduced have none."""


@dataclass(frozen=True)
class Manifest:
    """What is known of a checkpoint without reading it."""

    step: int
    """Optimizer steps done."""
    size_bytes: int
    sha256: str
    data: dict[str, Any] | None = None
    """State of the data module: position in each dataset. None where it has none."""
    metrics: dict[str, float] = field(default_factory=dict)
    """What a validation at this step measured, by tag."""
    format_version: int = FORMAT_VERSION

    def with_metrics(self, metrics: dict[str, float]) -> "Manifest":
        """The same checkpoint, measured."""
        return replace(self, metrics=self.metrics | metrics)

    def write(self, checkpoint: Path) -> None:
        """Write it beside its checkpoint, whole or not at all, down to the disk.

        Raises:
            OSError: the storage does not take it.
        """
        # As it will be read: keys are text then.
        fields = json.loads(json.dumps(asdict(self)))
        text = json.dumps(fields | {_OWN_HASH: _hash_of(fields)}, indent=1)
        with atomic_file(manifest_path(checkpoint), may_copy=True) as file:
            file.write(f"{text}\n".encode())

    @classmethod
    def read(cls, checkpoint: Path) -> "Manifest":
        """The manifest of a checkpoint.

        Raises:
            OSError: there is none, or it cannot be read.
            ValueError: it is damaged, or of a newer format.
        """
        try:
            fields = json.loads(manifest_path(checkpoint).read_text(encoding="utf-8"))
            version = fields["format_version"]
            own_hash = fields.pop(_OWN_HASH, None)
            is_damaged = own_hash is not None and own_hash != _hash_of(fields)
        except (ValueError, RecursionError, TypeError, KeyError, AttributeError):
            is_damaged = True
        if is_damaged:
            raise ValueError("its manifest is damaged")
        if version != FORMAT_VERSION:
            raise ValueError(f"its manifest has format_version {version!r}; accepted: {FORMAT_VERSION}")
        try:
            manifest = cls(**fields)
        except TypeError:
            raise ValueError("its manifest is damaged") from None
        if not manifest._is_well_formed():
            raise ValueError("its manifest is damaged")
        return manifest

    def _is_well_formed(self) -> bool:
        return (
            all(type(number) is int and number >= 0 for number in (self.step, self.size_bytes))
            and isinstance(self.sha256, str)
            and isinstance(self.data, dict | None)
            and isinstance(self.metrics, dict)
            and all(isinstance(value, float | int) for value in self.metrics.values())
        )


def _hash_of(fields: dict[str, Any]) -> str:
    return sha256_bytes(json.dumps(fields, sort_keys=True).encode())


def manifest_path(checkpoint: Path) -> Path:
    """Where the manifest of a checkpoint is: `a/step=5.ckpt` -> `a/step=5.manifest.json`."""
    return checkpoint.with_name(checkpoint.name.removesuffix(CHECKPOINT_SUFFIX) + MANIFEST_SUFFIX)


def identity_of(checkpoint: Path) -> dict[str, Any]:
    """Path and SHA-256 of a checkpoint, as its manifest says; no SHA-256 where it has none."""
    try:
        sha256 = Manifest.read(checkpoint).sha256
    except (OSError, ValueError):
        sha256 = None
    return {"path": str(checkpoint), "sha256": sha256}


def problem_of(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, every byte of which is read; None if it is what its manifest says.

    The answer for a file that has not changed since is remembered.
    """
    try:
        manifest = Manifest.read(checkpoint)
    except FileNotFoundError:
        return "it has no manifest, so it was not saved to its end"
    except (OSError, ValueError) as error:
        return reason_of(error)
    try:
        status = checkpoint.stat()
        if status.st_size != manifest.size_bytes:
            return f"it has {status.st_size:,} bytes, its manifest says {manifest.size_bytes:,}"
        digest = _sha256_of(checkpoint, status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)
    except OSError as error:
        return reason_of(error)
    return None if digest == manifest.sha256 else "its content has changed since it was saved: SHA-256 differs"


@lru_cache(maxsize=64)
def _sha256_of(checkpoint: Path, *identity: int) -> str:
    return sha256_file(checkpoint)
