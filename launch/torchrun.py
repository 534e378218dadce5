"""Trains by torchrun, and ends with the exit code of the rank that failed first, where torchrun itself ends with 1.

    python launch/torchrun.py --nproc_per_node=8 \
        -- fit --config=recipe:llama-150m-64k-muse --data.sources=null --trainer.devices=8 --resume

On each of several nodes, all of which see the same runs/ and data/:

    python launch/torchrun.py --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 \
        -- fit --config=recipe:llama-150m-64k-muse --data.sources=null \
        --trainer.num_nodes=2 --trainer.devices=8 --resume

Before `--` stand options of torchrun, after it the command line of `muse`. Who repeats a command until it succeeds can
tell by the code whether to: docs/reliability.md.
"""

import os
import signal
import sys
from collections.abc import Sequence

from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main as torchrun

from muse_lightning.errors import ExitCode

SECONDS_TO_SAVE = "300"
"""What ranks have between the SIGTERM and the SIGKILL of torchrun; its default of 30 can be less than a save takes."""


def main(arguments: Sequence[str]) -> int:
    """Run torchrun and return an exit code of `muse`, or 128 + N of a rank that signal N has killed."""
    if "--" not in arguments:
        print(
            "error: no -- found; accepted: options of torchrun, --, a command line of muse such as fit --config=...",
            file=sys.stderr,
        )
        return ExitCode.USER_ERROR
    middle = list(arguments).index("--")
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", SECONDS_TO_SAVE)
    try:
        torchrun([*arguments[:middle], "--module", "muse_lightning.cli", *arguments[middle + 1 :]])
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
        return code if code >= 0 else 128 - code
    except SignalException as stop:
        # The ranks have had the signal too, and have saved if they could; what they ended with torchrun does not tell.
        return ExitCode.RETRY if stop.sigval == signal.SIGTERM else ExitCode.INTERRUPTED
    return ExitCode.DONE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
