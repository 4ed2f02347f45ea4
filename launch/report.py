"""Writes a run's report, one self-contained HTML file: ``python launch/report.py RUN [--picture FILE.png]``."""

import argparse
from pathlib import Path

from rl.cli import user_errors
from rl.report import write_picture, write_report

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--picture", type=Path, help="also write four of its plots as one PNG")
    args = parser.parse_args()
    with user_errors():
        print(write_report(args.run))
        if args.picture is not None:
            print(write_picture(args.run, args.picture))
