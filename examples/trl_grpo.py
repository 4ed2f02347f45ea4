"""GRPO in TRL with Paceline's rollouts: the two lines that differ from a plain TRL script are marked."""

import argparse

import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from paceline import paceline_rollouts  # the first line
from paceline.rl.models.policies import fetch_policy

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--policy", default="tiny-llama", help="Hugging Face id, directory or built-in name")
parser.add_argument("--steps", type=int, default=4)
parser.add_argument("--out", default="runs/trl")
options = parser.parse_args()


def digits(completions, **columns):
    """Rewards the share of digits in a completion: something that even a random policy learns."""
    return [sum(c.isdigit() for c in text) / max(len(text), 1) for text in completions]


args = GRPOConfig(
    options.out,
    max_steps=options.steps,
    per_device_train_batch_size=8,
    num_generations=8,
    max_completion_length=24,
    learning_rate=1e-3,
    report_to="none",
    use_cpu=not torch.cuda.is_available(),
    bf16=torch.cuda.is_available(),
)
# one rank never waits for another, so here the drafter is trained after the rollouts
drafter = {"schedule": "always", "draft_vocab_size": 48}
trainer = GRPOTrainer(
    model=str(fetch_policy(options.policy)),
    reward_funcs=digits,
    args=args,
    train_dataset=Dataset.from_list([{"prompt": "2 + 2 ="}] * 32),
    rollout_func=paceline_rollouts(args, drafter=drafter),  # the second line
)
trainer.train()
