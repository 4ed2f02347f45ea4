"""The process that prepares what a run starts from.

It runs as ``python -m paceline.rl.preparation_process policy|drafter RECIPE.json COMMAND PARENT``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from paceline.rl.errors import UserError, user_errors
from paceline.rl.process.parent_death import end_with_parent


def main(what: str, recipe: str, command: str, parent: str) -> None:
    """Prepares a policy or a drafter; see `paceline.rl.preparation`.

    Args:
        what: ``policy`` or ``drafter``.
        recipe: JSON file with the complete recipe.
        command: Command that the user typed, for the record.
        parent: Process id of the parent; this process ends when the parent does.
    """
    end_with_parent(int(parent))
    from paceline.rl.config.parsing import parse
    from paceline.rl.config.run import RunConfig
    from paceline.rl.preparation import make_first_drafter, make_policy
    from paceline.rl.process.process_tuning import fit_process
    from paceline.rl.process.progress import Display

    with user_errors(), Display() as display:
        config = parse(RunConfig, json.loads(Path(recipe).read_text()), where=recipe)
        fit_process(local_world_size=1)
        try:
            if what == "policy":
                make_policy(config, display)
            else:
                make_first_drafter(config, command, display)
        except OSError as error:
            raise UserError(
                f"{error}: free disk space or set PACELINE_CACHE, then run the same command again"
            ) from None


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except KeyboardInterrupt:
        sys.exit(130)
