"""Downloads a model and prints its directory, as ``paceline fetch`` does.

Run ``python launch/fetch_model.py MODEL``.
"""

import typer

from paceline.cli.policy import fetch

if __name__ == "__main__":
    typer.run(fetch)
