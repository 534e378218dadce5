"""Disturb runs at random, for a time: `python -m tests.faults.campaign --minutes 60 --out campaign.jsonl`.

`--replay SEED` repeats one run: the same faults at the same instants.
"""

import argparse
import sys
import time
from pathlib import Path

from tests.faults.campaign.campaign import Campaign
from tests.faults.campaign.report import table


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.campaign", description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="Of the first run; the next has the next.")
    parser.add_argument("--minutes", type=float, default=60.0, help="No run starts after that.")
    parser.add_argument("--runs", type=int, default=None, help="Most runs.")
    parser.add_argument("--processes", type=int, default=1, help="Runs at a time.")
    parser.add_argument("--out", type=Path, default=None, help="File for the records, a JSON line for each injection.")
    parser.add_argument("--replay", type=int, default=None, metavar="SEED", help="Repeat one run, and keep its logs.")
    parser.add_argument("--kinds", nargs="*", default=None, help="Kinds of faults to draw from; all by default.")
    parser.add_argument("--tour", choices=["short", "long"], help="A few kinds of fault once, or all others.")
    options = parser.parse_args()
    began = time.monotonic()
    with Campaign(kinds=options.kinds, keeps_logs=options.replay is not None) as campaign:
        if options.tour is not None:
            records = campaign.run_tour(options.tour == "short")
        elif options.replay is not None:
            records = campaign.run([options.replay])
        else:
            records = campaign.run_for(
                options.seed, 60 * options.minutes, options.runs, options.processes, out=options.out
            )
    print(table(records, time.monotonic() - began))
    return 1 if any(record.problems for record in records) else 0


if __name__ == "__main__":
    sys.exit(main())
