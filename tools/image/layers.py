"""A table of an image's layers and what they take compressed.

Usage: python layers.py BLOBS MANIFEST [--budget_gb 0.6]

BLOBS: the folder blobs/sha256 of an OCI layout; MANIFEST: the digest of the image's manifest, without its algorithm.
Exit code 1 if the image takes more than the budget.
"""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any


def layers(manifest: dict[str, Any], config: dict[str, Any]) -> list[tuple[str, int]]:
    """What made each layer, and its compressed bytes, from the base upwards."""
    made_by = [entry["created_by"] for entry in config["history"] if not entry.get("empty_layer")]
    sizes = [layer["size"] for layer in manifest["layers"]]
    if len(made_by) != len(sizes):
        raise ValueError(f"{len(made_by)} steps in the history that made a layer, {len(sizes)} layers")
    return [(shortened(step), size) for step, size in zip(made_by, sizes, strict=True)]


def shortened(step: str) -> str:
    """A step as the Dockerfile has it: COPY with its two ends, RUN with its first words."""
    step = re.sub(r"^/bin/sh -c (#\(nop\) )?", "", re.sub(r"\s+", " ", step)).strip()
    return step if len(step) <= 70 else step[:67] + "..."


def main(arguments: list[str] | None = None) -> int:
    """Print the table; return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("blobs", type=Path)
    parser.add_argument("manifest")
    parser.add_argument("--budget_gb", type=float, default=float("inf"), help="10^9 bytes that it may take")
    options = parser.parse_args(arguments)
    manifest = json.loads((options.blobs / options.manifest).read_text())
    config = json.loads((options.blobs / manifest["config"]["digest"].removeprefix("sha256:")).read_text())
    table = layers(manifest, config)
    total = sum(size for _, size in table)
    print("| layer | MB, compressed |\n| --- | --- |")
    for step, size in table:
        print(f"| `{step}` | {size / 1e6:,.1f} |")
    print(f"| all | {total / 1e6:,.1f} |")
    if total > options.budget_gb * 1e9:
        print(f"{total / 1e9:.2f} GB, and {options.budget_gb} GB is what the image may take", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
