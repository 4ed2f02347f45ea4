"""Lists the benchmarks and runs one: ``paceline bench NAME`` or ``python launch/bench.py NAME``.

A benchmark is one module with ``add_arguments(parser)`` and ``run(args)``, and one line in `STUDIES`. The
first line of its docstring is its summary in ``paceline bench --help``; the whole docstring is the
description in ``paceline bench NAME --help``.
"""

from __future__ import annotations

import argparse
import ast
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from paceline.benchmarks.common.results import check_target
from paceline.rl.errors import user_errors
from paceline.rl.process.console import announce

STUDIES = {
    "rollout": "decoding.rollout",
    "drafters": "decoding.drafters",
    "verifiers": "decoding.verifiers",
    "selection": "decoding.selection",
    "products": "decoding.products",
    "served": "decoding.served",
    "vllm-depths": "decoding.vllm_depths",
    "vllm-suffix": "decoding.vllm_suffix",
    "gpu-check": "gpu.check",
    "plan": "decoding.plan",
    "update": "training.update",
    "seeds": "training.seeds",
    "learning": "training.learning",
    "sharding": "training.sharding",
    "losses": "training.losses",
    "context": "training.context",
    "parallel-drafts": "training.parallel_drafts",
    "idle": "training.idle",
    "online": "training.online",
    "trl": "training.trl",
    "gpu-rl": "training.end_to_end",
    "lengths": "lengths.rewards",
    "prediction": "lengths.prediction",
    "tail": "lengths.tail",
    "plots": "common.plots",
}


def docstring(name: str) -> str:
    """Returns the docstring of a benchmark's module without importing it, which would load torch."""
    path = Path(__file__).parent / f"{STUDIES[name].replace('.', '/')}.py"
    return ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""


def main(arguments: Sequence[str] | None = None, program: str | None = None) -> None:
    """Runs the benchmark that the arguments name.

    Args:
        arguments: Command-line arguments; None takes those of the process.
        program: Program name in usage lines; None takes that of the process.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    raw = argparse.RawDescriptionHelpFormatter
    texts = {name: docstring(name) for name in STUDIES}
    listing = "\n".join(f"  {name:<16}{text.splitlines()[0]}" for name, text in texts.items())
    parser = argparse.ArgumentParser(
        prog=program,
        description="Runs a benchmark. NAME --help describes one; benchmarks/README.md lists the results.",
        epilog=f"benchmarks:\n{listing}",
        formatter_class=raw,
    )
    commands = parser.add_subparsers(dest="command", metavar="NAME", required=True)
    for name, text in texts.items():
        commands.add_parser(name, description=text, formatter_class=raw)
    chosen = next((a for a in arguments if not a.startswith("-")), None)
    with user_errors():
        if chosen in STUDIES:
            announce(f"bench {chosen}: loading torch and transformers")
            study = import_module(f"paceline.benchmarks.{STUDIES[chosen]}")
            study.add_arguments(commands.choices[chosen])
        args = parser.parse_args(arguments)
        if "out" in args:
            check_target(args.out)
        study.run(args)
