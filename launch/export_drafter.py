"""A run's drafter for vLLM and SGLang: ``python launch/export_drafter.py RUN OUT``, the same as
``paceline export``.
"""

import typer

from paceline.cli.drafter import export

if __name__ == "__main__":
    typer.run(export)
