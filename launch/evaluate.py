"""Evaluates a policy, as ``paceline evaluate`` does: ``python launch/evaluate.py --run runs/mine``."""

import typer

from paceline.cli.results import evaluate

if __name__ == "__main__":
    typer.run(evaluate)
