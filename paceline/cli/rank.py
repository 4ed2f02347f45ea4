"""One rank of ``paceline train``: ``python -m paceline.cli.rank``, with the arguments of launch/train.py."""

import sys
from collections.abc import Sequence

from paceline.rl.process.parent_death import end_with_launcher


def rank_command(ranks: int, arguments: Sequence[str]) -> list[str]:
    """The command that starts the ranks of a run on this machine: torchrun for several, else one process.

    Args:
        ranks: How many.
        arguments: Those of launch/train.py.
    """
    several = (
        ["-m", "paceline.cli.ranks", "--standalone", "--nproc_per_node", str(ranks)] if ranks > 1 else []
    )
    return [sys.executable, *several, "-m", "paceline.cli.rank", *arguments]


if __name__ == "__main__":
    end_with_launcher()  # before anything that takes long
    # here: scoring processes import this file anew, and need none of it
    from paceline.rl.process.console import announce

    announce("loading torch and transformers")
    from paceline.rl.run import main

    main(None)
