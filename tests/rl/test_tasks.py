"""Problems, their order, their scorers, and files that are broken."""

import json

import pytest

from rl.errors import UserError
from rl.rewards.verifiable import final_answer, load_reward, math_score, verifiable_reward
from rl.task_config import DatasetConfig, TaskConfig
from rl.tasks import load_task
from rl.worked_solutions import worked_solution

CHAIN = TaskConfig(datasets=(DatasetConfig("chain_sum", 3.0), DatasetConfig("gcd", 1.0)), size=40, instruction="Think.")


def test_worked_solutions_earn_full_reward():
    task = load_task(TaskConfig(datasets=(DatasetConfig("chain_sum", params={"min_terms": 2, "max_terms": 9}),), size=50), seed=3)
    for problem in task.problems:
        assert problem.score(worked_solution("chain_sum", problem.entry)) == 1.0


def test_worked_solution_by_hand():
    entry = {"metadata": {"expression": "4 - 9 + 12"}}
    assert worked_solution("chain_sum", entry) == "4 - 9 = -5\n-5 + 12 = 7\nAnswer: 7"
    with pytest.raises(UserError, match="no worked solutions for 'gcd'"):
        worked_solution("gcd", entry)


def test_mixture_and_epochs():
    task = load_task(CHAIN, seed=0)
    assert sum(p.dataset == "chain_sum" for p in task.problems) == 30
    assert all(p.question.endswith("Think.") for p in task.problems)
    first = [p.key for step in range(5) for p in task.batch(step, 8)]
    second = [p.key for step in range(5, 10) for p in task.batch(step, 8)]
    assert sorted(first) == sorted(second) == sorted({p.key for p in task.problems})
    assert first != second
    assert [p.key for p in load_task(CHAIN, seed=0).batch(7, 8)] == second[16:24]


@pytest.mark.parametrize(
    ("text", "answer"),
    [("Answer: 7", "7"), ("Answer: 3\nno, Answer: 4 \nmore", "4"), ("7", None), ("Answer:", None), ("Answer:\n5", None)],
)
def test_final_answer(text, answer):
    assert final_answer(text) == answer


def test_math_verify_scores_equal_forms():
    score = math_score("\\frac{1}{2}")
    assert score("so it is 1/3. Answer: 0.5") == 1.0
    assert score("Answer: 2") == 0.0
    assert score("nothing here") == 0.0


def test_a_users_reward_is_found_by_name(tmp_path, monkeypatch):
    (tmp_path / "short_reward.py").write_text("def brevity(completions, **_):\n    return [1.0 / len(c) for c in completions]\n")
    monkeypatch.chdir(tmp_path)
    assert load_reward("short_reward:brevity")(prompts=[""], completions=["four"], problem=[None], answer=["x"]) == [0.25]
    with pytest.raises(UserError, match="write module:function"):
        load_reward("short_reward:absent")


def test_reward_has_trls_signature():
    problem = load_task(CHAIN, seed=0).problems[0]
    right = f"Answer: {problem.answer}"
    assert verifiable_reward(prompts=["", ""], completions=[right, "?"], problem=[problem] * 2, extra=[1, 2]) == [1.0, 0.0]


def test_jsonl(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps({"prompt": "1+1", "answer": 2}) + "\n\n" + json.dumps({"prompt": "2+2", "answer": "4"}) + "\n")
    problems = load_task(TaskConfig(source="jsonl", path=str(path)), seed=0).problems
    assert [(p.question, p.answer, p.score(f"Answer: {p.answer}.0")) for p in problems] == [("1+1", "2", 1.0), ("2+2", "4", 1.0)]


GOOD = b'{"prompt": "1", "answer": "1"}\n'


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (GOOD + b'{"prompt": "\xff", "answer": "1"}\n', r":2: not UTF-8"),
        (GOOD + GOOD + b'{"prompt": "1", "ans', r":3: not JSON"),
        (b'{"prompt": "1"}\n', r":1: no answer"),
        (b"3\n", r":1: no prompt and no answer"),
        (b"\n", "no problems"),
    ],
)
def test_broken_jsonl_is_named_by_line(tmp_path, content, says):
    path = tmp_path / "p.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match=says):
        load_task(TaskConfig(source="jsonl", path=str(path)), seed=0)


def test_unknown_dataset_and_parameters():
    with pytest.raises(UserError, match="did you mean chain_sum"):
        load_task(TaskConfig(datasets=(DatasetConfig("chain_summ"),)), seed=0)
    with pytest.raises(UserError, match="refuses the parameters"):
        load_task(TaskConfig(datasets=(DatasetConfig("chain_sum", params={"min_terms": 0}),)), seed=0)
    with pytest.raises(UserError, match="no such file"):
        load_task(TaskConfig(source="jsonl", path="/nowhere.jsonl"), seed=0)
