"""Loss on random tokens with its standard error: with Muse, with Dense, and of each leak made on purpose.

Usage: python -m tests.leak [--size small|real] [--steps N]

`real` needs a GPU.
"""

import argparse
from dataclasses import replace

import torch

from tests.leak.leaks import CONTROLS, HONEST
from tests.leak.settings import REAL_CHUNKS, SMALL
from tests.leak.training import train_and_evaluate


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=["small", "real"], default="small")
    parser.add_argument("--steps", type=int, default=None, help="instead of the setting's")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    setting = SMALL if options.size == "small" else REAL_CHUNKS
    setting = replace(setting, steps=options.steps or setting.steps)
    print("| trained | evaluated | loss - log(vocabulary), nats | advantage |\n| --- | --- | --- | --- |")
    for name, leak in {"Muse": HONEST, **CONTROLS}.items():
        with leak():
            result, dense = train_and_evaluate(setting, options.seed)
        for attention, found in (("Muse", result), ("Dense", dense)):
            print(f"| {name} | {attention} | {found.excess} | {found.advantage} |", flush=True)


if __name__ == "__main__":
    main()
