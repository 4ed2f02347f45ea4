"""Exports a run's drafter, as ``paceline export`` does: ``python launch/export_drafter.py RUN OUT``."""

import typer

from paceline.cli.drafter import export

if __name__ == "__main__":
    typer.run(export)
