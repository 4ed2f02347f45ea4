"""Resolves a model id to a directory: ``python launch/fetch_model.py MODEL``, the same as ``paceline
fetch``.
"""

import typer

from paceline.cli.policy import fetch

if __name__ == "__main__":
    typer.run(fetch)
