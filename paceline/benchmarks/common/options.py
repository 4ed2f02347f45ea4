"""Command-line options that several benchmarks share."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_policy_options(parser: argparse.ArgumentParser, out: Path) -> None:
    """Adds the options of a benchmark that decodes with the policy and drafter of a finished run.

    Args:
        parser: Parser to extend.
        out: Default of ``--out``.
    """
    parser.add_argument("--config", required=True, help="recipe of the run")
    parser.add_argument(
        "--run", type=Path, required=True, help="finished run whose policy and drafter are used"
    )
    parser.add_argument(
        "--batches", nargs="*", default=["1", "4", "16"], help="numbers of concurrent sequences, or none"
    )
    parser.add_argument(
        "--temperatures", nargs="+", type=float, default=[1.0, 0.7], help="sampling temperatures"
    )
    parser.add_argument("--out", type=Path, default=out, help="JSON file of the results")
