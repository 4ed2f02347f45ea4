"""Benchmarks: ``python launch/bench.py --help``, the same as ``paceline bench``."""

from rl.commands.bench import main

if __name__ == "__main__":
    main()
