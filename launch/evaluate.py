"""A policy on problems it was not trained on: ``python launch/evaluate.py configs/quickstart.yaml --run runs/mine``.

``--budgets 24 48`` also steers the policy to those lengths by budget guidance, which is lossy: it changes the output distribution,
so it is for evaluation alone.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from rl.cli import user_errors
from rl.config import load_config
from rl.evaluate import Evaluator
from rl.machine import fit_process
from rl.starting import starting_policy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="a recipe, for its task and sampling")
    parser.add_argument("--run", type=Path, help="a finished run; else the policy that the recipe starts from")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--budgets", type=int, nargs="*", default=[], help="tokens to steer to, LOSSY")
    parser.add_argument("--out", type=Path, help="JSON file")
    parser.add_argument("overrides", nargs="*", help="key=value")
    args = parser.parse_intermixed_args()
    fit_process(local_world_size=1)
    config = load_config(args.config, args.overrides)
    evaluator = Evaluator(
        config, starting_policy(config) if args.run is None else args.run / "checkpoint" / "policy", args.prompts, args.samples
    )
    rows = [evaluator.exact()]
    if args.budgets:
        head = evaluator.predictor(args.prompts)
        rows += [evaluator.steered(head, budget) for budget in args.budgets]
    for row in rows:
        lengths = f"length {row.length:.1f}, at most {row.longest}"
        print(f"{row.way:<34} accuracy {row.accuracy:.3f}  {lengths}  ({row.completions} completions)")
    if args.out is not None:
        args.out.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


if __name__ == "__main__":
    with user_errors():
        main()
