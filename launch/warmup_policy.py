"""Warms a recipe's policy up: ``python launch/warmup_policy.py configs/quickstart.yaml``, the same as
``paceline warmup``.
"""

import typer

from paceline.cli.policy import warm_up_policy

if __name__ == "__main__":
    typer.run(warm_up_policy)
