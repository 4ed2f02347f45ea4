"""Writes a run's report: ``python launch/report.py RUN [--picture FILE.png]``, the same as
``paceline report``.
"""

import typer

from paceline.cli.results import report

if __name__ == "__main__":
    typer.run(report)
