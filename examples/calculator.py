"""GRPO with a calculator, in TRL: a turn ends at ``</calc>``, then the calculator appends the value.

``python examples/calculator.py --policy Qwen/Qwen2.5-0.5B-Instruct --steps 100``; without arguments a tiny
random policy plays, in seconds on a CPU. docs/multi_turn.md explains what happens between turns.
"""

import argparse
import random
import re

import torch
from datasets import Dataset
from transformers import AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from paceline import paceline_rollouts
from paceline.rl.models.policies import fetch_policy

ASK = "What is {}? <calc>EXPRESSION</calc> computes. End with Answer: NUMBER\n"
REMINDER = "\nWrite <calc>EXPRESSION</calc> or Answer: NUMBER\n"
NUMBER = r"-?(0|[1-9]\d{0,15})"


def value(expression):
    """Computes sums, differences and products of whole numbers; raises ValueError for anything else."""
    if len(expression) > 80 or not re.fullmatch(rf"\s*{NUMBER}(\s*[-+*]\s*{NUMBER})*\s*", expression):
        raise ValueError("only +, - and * of whole numbers are computed")
    return eval(expression.strip())  # digits, blanks and these three operators are all that gets here


def calculator(talk):
    """Answers the policy's last turn, or returns None to end the conversation."""
    if answer := re.search(r"Answer:\s*(-?\d+)", talk.turns[-1]):
        talk.columns["answer"] = int(answer[1])  # a column for the reward function
        return None
    call = re.search(r"<calc>(.*?)</calc>", talk.turns[-1])
    if call is None:
        return REMINDER
    talk.columns["calls"] = talk.columns.get("calls", 0) + 1
    try:
        return f" = {value(call[1])}\n"
    except ValueError as error:
        return f" error: {error}\n"


def correct(completions, result, answer=None, calls=None, **columns):
    """Rewards the right answer with 1, and the use of the calculator with a tenth."""
    missing = [None] * len(completions)
    rows = zip(answer or missing, calls or missing, result, strict=True)
    return [float(given == expected) + 0.1 * bool(called) for given, called, expected in rows]


def main():
    """Trains with conversations of at most three turns."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--policy", default="tiny-llama", help="Hugging Face id, directory or built-in name")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--turn-tokens", type=int, default=24, help="maximum length of a turn")
    parser.add_argument("--out", default="runs/calculator")
    options = parser.parse_args()
    policy, gpu, draw = fetch_policy(options.policy), torch.cuda.is_available(), random.Random(0)
    sums = [f"{draw.randint(10, 99)} * {draw.randint(10, 99)} + {draw.randint(10, 99)}" for _ in range(64)]
    args = GRPOConfig(
        output_dir=options.out,
        max_steps=options.steps,
        per_device_train_batch_size=8,
        num_generations=4,
        max_completion_length=3 * options.turn_tokens + 96,  # three turns and the calculator's answers
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=not gpu,
        bf16=gpu,
    )
    rollouts = paceline_rollouts(args, rollout={"stop_strings": ["</calc>"]})
    trainer = GRPOTrainer(
        model=str(policy),
        reward_funcs=correct,
        args=args,
        train_dataset=Dataset.from_list([{"prompt": ASK.format(s), "result": value(s)} for s in sums]),
        processing_class=AutoTokenizer.from_pretrained(policy),
        rollout_func=lambda prompts, trainer: rollouts.converse(
            prompts, trainer, calculator, turns=3, turn_tokens=options.turn_tokens
        ),
    )
    trainer.train()
    return trainer


if __name__ == "__main__":
    main()
