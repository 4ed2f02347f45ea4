"""Writes a run's report, one self-contained HTML file: ``python launch/report.py RUN``."""

import argparse
from pathlib import Path

from rl.cli import user_errors
from rl.report import write_report

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    with user_errors():
        print(write_report(parser.parse_args().run))
