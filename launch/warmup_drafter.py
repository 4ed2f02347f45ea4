"""Makes a first drafter for a recipe's policy: ``python launch/warmup_drafter.py configs/quickstart.yaml OUT [key=value …]``.

Start a run from it with ``drafter.start=OUT``. ``OUT/warmup.json`` says how long it took and what acceptance it reached.
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from rl.cli import user_errors
from rl.config import load_config
from rl.drafter_warmup import warm_drafter
from rl.errors import UserError
from rl.machine import fit_process
from rl.warmup import warm_up


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config")
    parser.add_argument("out", type=Path, help="new directory")
    parser.add_argument("overrides", nargs="*", help="key=value")
    parser.add_argument("--minutes", type=float, default=10.0, help="of sampling and training together")
    args = parser.parse_args()
    if args.out.exists():
        raise UserError(f"{args.out}: exists; name a new directory")
    config = load_config(args.config, args.overrides)
    fit_process(local_world_size=1)
    if config.policy.warmup is not None:
        warm_up(config)
    report = warm_drafter(config, args.minutes, args.out, lambda line: print(line, flush=True))
    record = {"command": " ".join(["python", *sys.argv]), **asdict(report)}
    (args.out / "warmup.json").write_text(json.dumps(record, indent=2) + "\n")
    print(
        f"{report.sampling_seconds:.0f} s of sampling, {report.training_seconds:.0f} s of training, {report.updates} updates; "
        f"acceptance length, chains of 4: {report.greedy:.2f} greedy, {report.sampled:.2f} at {config.rollout.temperature}"
    )
    print(args.out)


if __name__ == "__main__":
    with user_errors():
        main()
