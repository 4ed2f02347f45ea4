"""Writes a run's report, as ``paceline report`` does.

Run ``python launch/report.py RUN [--picture FILE.png]``.
"""

import typer

from paceline.cli.results import report

if __name__ == "__main__":
    typer.run(report)
