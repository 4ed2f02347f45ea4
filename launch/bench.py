"""Runs a benchmark, as ``paceline bench`` does: ``python launch/bench.py --help``."""

from paceline.benchmarks.main import main

if __name__ == "__main__":
    main()
