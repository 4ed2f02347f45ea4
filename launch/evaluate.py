"""A policy on other problems: ``launch/evaluate.py configs/quickstart.yaml --run runs/mine``, the same as
``paceline evaluate``.
"""

import typer

from paceline.cli.results import evaluate

if __name__ == "__main__":
    typer.run(evaluate)
