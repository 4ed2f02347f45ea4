"""Benchmarks: ``python launch/bench.py --help``, the same as ``paceline bench``."""

from paceline.benchmarks.main import main

if __name__ == "__main__":
    main()
