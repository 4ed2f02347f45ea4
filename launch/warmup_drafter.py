"""A first drafter: ``python launch/warmup_drafter.py configs/quickstart.yaml OUT [--minutes 10]``, part of
``paceline warmup``.
"""

import typer

from paceline.cli.drafter import warm_up_drafter

if __name__ == "__main__":
    typer.run(warm_up_drafter)
