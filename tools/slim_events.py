"""Event files with their scalars alone, small enough to be kept beside results.

Usage: python tools/slim_events.py FOLDER... OUT

A run folder runs/NAME/version_N becomes OUT/NAME, any other folder OUT/its name. `tensorboard --logdir OUT` shows them.
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
    for folder in options.folders:
        files = sorted(folder.glob("events.out.tfevents.*"))
        if not files:
            parser.error(f"{folder}: has no event files; give the folder of a run, such as runs/demo/version_0")
        name = folder.parent.name if re.fullmatch(r"version_\d+", folder.name) else folder.name
        scalars = sum(slim(file, options.out / name / file.name) for file in files)
        print(f"{options.out / name}: {scalars:,} scalars")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
