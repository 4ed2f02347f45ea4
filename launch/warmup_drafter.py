"""Trains a first drafter, as ``paceline warmup --drafter`` does.

Run ``python launch/warmup_drafter.py configs/quickstart.yaml OUT [--minutes 10]``.
"""

import typer

from paceline.cli.drafter import warm_up_drafter

if __name__ == "__main__":
    typer.run(warm_up_drafter)
