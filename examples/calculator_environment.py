"""The environment and the reward of calculator.py: they see text only, and nothing of the policy."""

import random
import re

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


def problems(count, seed=0):
    """Returns rows with a prompt and the right answer."""
    draw = random.Random(seed)
    sums = [f"{draw.randint(10, 99)} * {draw.randint(10, 99)} + {draw.randint(10, 99)}" for _ in range(count)]
    return [{"prompt": ASK.format(text), "result": value(text)} for text in sums]
