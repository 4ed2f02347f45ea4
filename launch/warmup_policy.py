"""Warms up a recipe's policy, as ``paceline warmup`` does.

Run ``python launch/warmup_policy.py configs/quickstart.yaml``.
"""

import typer

from paceline.cli.policy import warm_up_policy

if __name__ == "__main__":
    typer.run(warm_up_policy)
