"""The ranks of a run on this machine, under torchrun's agent: ``python -m paceline.cli.ranks``, with
torchrun's arguments.

What a rank says of its end is what the user reads: the agent's own account of it, a page, is left out.
"""

from __future__ import annotations

import os
import signal
import sys

from paceline.rl.process.parent_death import end_with_launcher


def main() -> int:
    """Starts the ranks and waits for them. Returns the status to exit with: the first failed rank's."""
    # of torchrun's modules, which read it when they are imported
    os.environ.setdefault("LOGLEVEL", "CRITICAL")
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
            f"paceline: rank {rank} was ended by {name}; --resume goes on from the last checkpoint",
            file=sys.stderr,
        )
        return 128 - int(failure.exitcode)
    except SignalException as ended:
        return 128 + int(ended.sigval)
    return 0


if __name__ == "__main__":
    end_with_launcher()
    raise SystemExit(main())
