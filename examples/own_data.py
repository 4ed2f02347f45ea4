"""Problems of your own: a JSONL file of prompts and reference answers, scored by math-verify."""

import json
import tempfile
from pathlib import Path

from paceline import load_recipe
from paceline.rl.tasks.task import load_task

rows = [
    {"prompt": "What is 1/2 + 1/4?", "answer": "3/4"},
    {"prompt": "What is 7 * 8?", "answer": "56"},
    {"prompt": "What is 15 - 6?", "answer": "9"},
    {"prompt": "What is 2 ** 10?", "answer": "1024"},
]

with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "problems.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    # the same keys on the command line: paceline train tiny task.source=jsonl task.path=problems.jsonl
    recipe = load_recipe("tiny", ["task.source=jsonl", f"task.path={path}"])
    task = load_task(recipe.task, recipe.seed)
    problem = next(p for p in task.problems if "1/2" in p.question)
    for completion in ("Half and a quarter. Answer: 0.75", "Answer: $\\frac{3}{4}$", "Answer: 1"):
        print(f"{problem.score(completion):.0f}  {completion}")
