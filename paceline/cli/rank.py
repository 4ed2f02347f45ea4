"""Runs one rank of ``paceline train``: ``python -m paceline.cli.rank``, with launch/train.py's arguments."""

import sys
from collections.abc import Sequence

from paceline.rl.process.parent_death import end_with_launcher


def rank_command(ranks: int, arguments: Sequence[str]) -> list[str]:
    """Returns the command that starts a run's ranks on this machine: torchrun for several, else one process.

    Args:
        ranks: Number of ranks.
        arguments: Arguments of launch/train.py.
    """
    several = (
        ["-m", "paceline.cli.ranks", "--standalone", "--nproc_per_node", str(ranks)] if ranks > 1 else []
    )
    return [sys.executable, *several, "-m", "paceline.cli.rank", *arguments]


if __name__ == "__main__":
    end_with_launcher()  # first, because everything below is slow
    # imported here because scoring processes import this file again and need none of this
    from paceline.rl.process.console import announce

    announce("loading torch and transformers")
    from paceline.rl.run import main

    main(None)
