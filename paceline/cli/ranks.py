"""Runs the ranks on this machine under torchrun's agent: ``python -m paceline.cli.ranks`` with its arguments.

The user sees a failed rank's own message. The agent's page-long report of the failure is suppressed.
"""

from __future__ import annotations

import logging
import os
import signal
import sys

from paceline.rl.process.parent_death import end_with_launcher


def main() -> int:
    """Starts the ranks, waits for them, and returns the exit status of the first failed rank, or 0."""
    # some of torchrun's modules read this when they are imported, others have plain loggers
    level = os.environ.setdefault("LOGLEVEL", "CRITICAL")
    logging.getLogger("torch.distributed.elastic").setLevel(level)
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    try:
        run(parse_args(sys.argv[1:]))
    except ChildFailedError as failed:
        rank, failure = failed.get_first_failure()
        if failure.exitcode >= 0:
            return int(failure.exitcode)
        name = signal.Signals(-failure.exitcode).name
        print(
            f"paceline: rank {rank} was ended by {name}; continue from the last checkpoint with --resume RUN",
            file=sys.stderr,
        )
        return 128 - int(failure.exitcode)
    except SignalException as ended:
        return 128 + int(ended.sigval)
    return 0


if __name__ == "__main__":
    end_with_launcher()
    raise SystemExit(main())
