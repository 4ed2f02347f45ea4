"""GRPO with a calculator, in TRL: a turn ends at ``</calc>``, then the calculator appends the value.

``python examples/calculator.py --policy Qwen/Qwen2.5-0.5B-Instruct --steps 100``; without arguments a tiny
random policy plays, in seconds on a CPU. docs/multi_turn.md explains what happens between turns.
"""

import argparse

import torch
from calculator_environment import calculator, correct, problems
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from paceline import paceline_rollouts
from paceline.rl.models.policies import fetch_policy


def main():
    """Trains with conversations of at most three turns."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--policy", default="tiny-llama", help="Hugging Face id, directory or built-in name")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--turn-tokens", type=int, default=24, help="maximum length of a turn")
    parser.add_argument("--out", default="runs/calculator")
    options, gpu = parser.parse_args(), torch.cuda.is_available()
    longest = 3 * options.turn_tokens + 96  # three turns and the calculator's answers
    steps = {"max_steps": options.steps, "logging_steps": 1, "save_strategy": "no", "report_to": "none"}
    batch = {"per_device_train_batch_size": 8, "num_generations": 4, "max_completion_length": longest}
    args = GRPOConfig(options.out, **steps, **batch, use_cpu=not gpu, bf16=gpu)
    rollouts = paceline_rollouts(args, rollout={"stop_strings": ["</calc>"]})
    trainer = GRPOTrainer(
        model=str(fetch_policy(options.policy)),
        reward_funcs=correct,
        args=args,
        train_dataset=Dataset.from_list(problems(64)),
        rollout_func=lambda prompts, trainer: rollouts.converse(
            prompts, trainer, calculator, turns=3, turn_tokens=options.turn_tokens
        ),
    )
    trainer.train()
    return trainer


if __name__ == "__main__":
    main()
