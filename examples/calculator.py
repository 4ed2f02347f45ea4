"""GRPO with a calculator, in TRL:
``python examples/calculator.py --policy Qwen/Qwen2.5-0.5B-Instruct --steps 100``.

The policy may write ``<calc>12 * 7 + 5</calc>``. Its turn ends there, the calculator appends the value, and
the policy goes on. It has three turns at most. docs/multi_turn.md says what happens in between. Without
arguments a tiny random policy plays, which takes seconds on a CPU.
"""

import argparse
import ast
import operator
import random
import re

import torch
from datasets import Dataset
from transformers import AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from paceline.rl.errors import user_errors
from paceline.rl.integrations.trl import paceline_rollouts
from paceline.rl.models.policies import fetch_policy

ASK = "What is {}? <calc>EXPRESSION</calc> computes. End with Answer: NUMBER\n"
REMINDER = "\nWrite <calc>EXPRESSION</calc> or Answer: NUMBER\n"
OPERATIONS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}


def value(expression):
    """The value of sums, differences and products of numbers; ValueError for anything else."""

    def of(node):
        match node:
            case ast.BinOp(left, operation, right) if type(operation) in OPERATIONS:
                return OPERATIONS[type(operation)](of(left), of(right))
            case ast.UnaryOp(ast.USub(), number):
                return -of(number)
            case ast.Constant(int() | float() as number):
                return number
        raise ValueError(f"{ast.unparse(node)} is no arithmetic")

    try:
        return of(ast.parse(expression[:80].strip(), mode="eval").body)
    except SyntaxError:
        raise ValueError("not an expression") from None


def calculator(talk):
    """The environment: answers the policy's last turn, or ends the conversation. What it notes becomes
    columns for the reward.
    """
    said = talk.turns[-1]
    answer = re.search(r"Answer:\s*(-?\d+)", said)
    if answer:
        talk.columns["answer"] = int(answer[1])
        return None
    asked = re.search(r"<calc>(.*?)</calc>", said)
    if asked is None:
        return REMINDER
    talk.columns["calls"] = talk.columns.get("calls", 0) + 1
    try:
        return f" = {value(asked[1])}\n"
    except ValueError as error:
        return f" error: {error}\n"


def correct(completions, result, answer=None, calls=None, **columns):
    """1 for the right answer, and a tenth for having asked the calculator."""
    missing = [None] * len(completions)
    told = zip(answer or missing, calls or missing, result, strict=True)
    return [float(said == wanted) + 0.1 * bool(asked) for said, asked, wanted in told]


def problems(count):
    """Rows of ``prompt`` and ``result``."""
    draw = random.Random(0)
    texts = [
        f"{draw.randint(10, 99)} * {draw.randint(10, 99)} + {draw.randint(10, 99)}" for _ in range(count)
    ]
    return Dataset.from_list([{"prompt": ASK.format(text), "result": value(text)} for text in texts])


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--policy", default="tiny-llama", help="hub id, directory or shipped name")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--turn-tokens", type=int, default=24, help="most tokens of a turn")
    parser.add_argument("--out", default="runs/calculator")
    options = parser.parse_args()
    policy = fetch_policy(options.policy)
    args = GRPOConfig(
        output_dir=options.out,
        max_steps=options.steps,
        per_device_train_batch_size=8,
        num_generations=4,
        # three turns and what the calculator says in between
        max_completion_length=3 * options.turn_tokens + 96,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
        bf16=torch.cuda.is_available(),
    )
    rollouts = paceline_rollouts(args, rollout={"stop_strings": ["</calc>"]})
    trainer = GRPOTrainer(
        model=str(policy),
        reward_funcs=correct,
        args=args,
        train_dataset=problems(64),
        processing_class=AutoTokenizer.from_pretrained(policy),
        rollout_func=lambda prompts, trainer: rollouts.converse(
            prompts, trainer, calculator, turns=3, turn_tokens=options.turn_tokens
        ),
    )
    trainer.train()
    return trainer


if __name__ == "__main__":
    with user_errors():
        main()
