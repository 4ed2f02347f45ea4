"""Resolves a model id to a directory: ``python launch/fetch_model.py MODEL``, the same as ``paceline fetch``."""

import typer

from paceline.rl.commands.policies import fetch

if __name__ == "__main__":
    typer.run(fetch)
