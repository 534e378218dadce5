"""Event files with their scalars alone, small enough to be kept beside results.

Usage: python tools/slim_events.py FOLDER... OUT

A run folder runs/NAME/version_N becomes OUT/NAME, any other folder OUT/its name, which must not be there yet.
`tensorboard --logdir OUT` shows them.
"""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader
from tensorboard.summary.writer.record_writer import RecordWriter


def slim(source: Path, target: Path) -> int:
    """Write the events of one file that have scalars, and the first, which says what file it is.

    Returns how many scalars they have.
    """
    count = 0
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("wb") as file:
        writer = RecordWriter(file)
        for event in LegacyEventFileLoader(str(source)).Load():
            scalars = [value for value in event.summary.value if value.HasField("simple_value")]
            del event.summary.value[:]
            event.summary.value.extend(scalars)
            if scalars or event.file_version:
                writer.write(event.SerializeToString())
            count += len(scalars)
        writer.flush()
    return count


def main(args: Sequence[str] | None = None) -> int:
    """Read, write, say how much; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER")
    parser.add_argument("out", type=Path, metavar="OUT")
    options = parser.parse_args(args)
    found: dict[Path, list[Path]] = {}
    for folder in options.folders:
        files = sorted(folder.glob("events.out.tfevents.*"))
        if not files:
            parser.error(f"{folder}: has no event files; give the folder of a run, such as runs/demo/version_0")
        absolute = folder.resolve()
        out = options.out / (absolute.parent if re.fullmatch(r"version_\d+", absolute.name) else absolute).name
        if out in found or out.exists():
            parser.error(f"{folder}: would be written to {out}, which {'another has' if out in found else 'exists'}")
        found[out] = files
    for out, files in found.items():
        scalars = sum(slim(file, out / file.name) for file in files)
        print(f"{out}: {scalars:,} scalars")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
