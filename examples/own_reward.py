"""GRPO with a reward function of your own; ``paceline train`` takes the same keys."""

import argparse
import json
from pathlib import Path

from paceline.rl.tasks.verifiable import verifiable_reward


def concise(prompts, completions, problem, **columns):
    """Scores each completion as the problem does, less a thousandth for each character."""
    correct = verifiable_reward(prompts, completions, problem=problem)
    return [c - 0.001 * len(text) for c, text in zip(correct, completions, strict=True)]


if __name__ == "__main__":  # scoring processes import this file, for the function above
    from paceline.rl.run import run

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="runs/own_reward")
    parser.add_argument("overrides", nargs="*", help="key=value")
    options = parser.parse_args()
    # the module is found from the current directory
    run(["tiny", f"out={options.out}", "task.reward=own_reward:concise", *options.overrides])
    for line in (Path(options.out) / "metrics.jsonl").read_text().splitlines():
        metrics = json.loads(line)
        print(f"step {metrics['step']}: reward {metrics['reward/mean']:.3f}")
