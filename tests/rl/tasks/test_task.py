"""Problems, their order, their scorers, and files that are broken."""

import json
import random
import sys
from collections import Counter
from itertools import islice

import pytest

from paceline.rl.config.task import DatasetConfig, TaskConfig
from paceline.rl.data.order import epoch_order, shuffled
from paceline.rl.errors import UserError
from paceline.rl.rewards.functions import load_reward
from paceline.rl.tasks.answers import final_answer
from paceline.rl.tasks.task import Problem, Task, load_heldout_task, load_task
from paceline.rl.tasks.verifiable import math_score, verifiable_reward
from paceline.rl.tasks.worked_solutions import worked_solution

CHAIN = TaskConfig(
    datasets=(DatasetConfig("chain_sum", 3.0), DatasetConfig("gcd", 1.0)), size=40, instruction="Think."
)


def test_worked_solutions_earn_full_reward():
    task = load_task(
        TaskConfig(datasets=(DatasetConfig("chain_sum", params={"min_terms": 2, "max_terms": 9}),), size=50),
        seed=3,
    )
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


def test_a_step_that_reaches_into_the_next_epoch_asks_again_with_other_seeds():
    task = Task([Problem(f"{i}", f"q{i}", "", lambda text: 0.0, {}, "") for i in range(5)], seed=0)
    asked = [(p.key, p.repeat) for p in task.batch(0, 12)]
    assert len(set(asked)) == 12 and {key for key, repeat in asked if repeat == 1} == {
        "0",
        "1",
        "2",
        "3",
        "4",
    }
    assert max(repeat for _, repeat in asked) == 2


def test_orders_of_a_large_epoch_cost_no_more_in_later_steps():
    """Every number once; what is drawn without an order of all is a permutation, too."""
    order = epoch_order(100_000, 7, 3)
    assert sorted(order) == list(range(100_000)) and list(order[:4]) == list(epoch_order(100_000, 7, 3)[:4])
    assert list(order[:9]) != list(epoch_order(100_000, 7, 4)[:9]) and list(order[:9]) != list(
        epoch_order(100_000, 8, 3)[:9]
    )
    assert sorted(shuffled(1000, random.Random(0))) == list(range(1000))
    firsts = Counter(next(shuffled(5, random.Random(i))) for i in range(5000))
    assert set(firsts) == set(range(5)) and max(firsts.values()) < 1.2 * min(firsts.values())
    few = list(islice(shuffled(10**12, random.Random(0)), 5))
    assert len(set(few)) == 5 and all(0 <= i < 10**12 for i in few)


def test_reasoning_gyms_problems_are_made_when_they_are_wanted():
    config = TaskConfig(datasets=(DatasetConfig("chain_sum", 3.0), DatasetConfig("gcd", 1.0)), size=10**6)
    task, again = load_task(config, seed=0), load_task(config, seed=0, check=False)
    asked = task.batch(5, 8)
    assert [again.find(p.key).question for p in asked] == [p.question for p in asked]
    assert (
        len(task.problems) == 10**6
        and task.problems[750_000].key == "1/0"
        and task.problems[749_999].key == "0/749999"
    )
    for unknown in ("0/750000", "2/0", "x/1", "1"):
        with pytest.raises(KeyError):
            task.find(unknown)


def test_the_first_import_of_reasoning_gym_warns_of_nothing(tmp_path, monkeypatch, recwarn):
    (tmp_path / "reasoning_gym").mkdir()
    (tmp_path / "reasoning_gym" / "__init__.py").write_text("same = 'a' is 'a'\ncreate_dataset = None\n")
    (tmp_path / "reasoning_gym" / "factory.py").write_text("DATASETS = {'nothing': None}\n")
    for name in [name for name in sys.modules if name.split(".")[0] == "reasoning_gym"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="did you mean nothing"):
        load_task(TaskConfig(datasets=(DatasetConfig("other"),), size=1), seed=0)
    assert not [warning for warning in recwarn if warning.category is SyntaxWarning]
    for name in ("reasoning_gym", "reasoning_gym.factory"):
        del sys.modules[name]


def test_held_out_problems_are_those_that_are_left_out():
    config = TaskConfig(datasets=CHAIN.datasets, size=40, heldout=0.25)
    trained, out = load_task(config, seed=0), load_heldout_task(config, seed=0)
    keys = [{p.key for p in task.problems} for task in (trained, out)]
    assert keys[0] | keys[1] == {p.key for p in load_task(CHAIN, seed=0).problems} and not keys[0] & keys[1]
    assert {p.key for step in range(20) for p in trained.batch(step, 8)} == keys[0]
    with pytest.raises(UserError, match=r"task\.heldout is 0, so no problems are held out"):
        load_heldout_task(CHAIN, seed=0)
    with pytest.raises(UserError, match="holds out none"):
        load_task(TaskConfig(datasets=CHAIN.datasets, size=2, heldout=1e-9), seed=0)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Answer: 7", "7"),
        ("Answer: 3\nno, Answer: 4 \nmore", "4"),
        ("7", None),
        ("Answer:", None),
        ("Answer:\n5", None),
    ],
)
def test_final_answer(text, answer):
    assert final_answer(text) == answer


def test_math_verify_scores_equal_forms():
    assert math_score("east")("Answer: east") == 1.0 and math_score("east")("Answer: west") == 0.0
    score = math_score("\\frac{1}{2}")
    assert score("so it is 1/3. Answer: 0.5") == 1.0
    assert score("Answer: 2") == 0.0
    assert score("nothing here") == 0.0


def test_a_users_reward_is_found_by_name(tmp_path, monkeypatch):
    (tmp_path / "short_reward.py").write_text(
        "def brevity(completions, **_):\n    return [1.0 / len(c) for c in completions]\n"
    )
    monkeypatch.chdir(tmp_path)
    assert load_reward("short_reward:brevity")(
        prompts=[""], completions=["four"], problem=[None], answer=["x"]
    ) == [0.25]
    with pytest.raises(UserError, match="write module:function"):
        load_reward("short_reward:absent")


def test_reward_has_trls_signature():
    problem = load_task(CHAIN, seed=0).problems[0]
    right = f"Answer: {problem.answer}"
    assert verifiable_reward(
        prompts=["", ""], completions=[right, "?"], problem=[problem] * 2, extra=[1, 2]
    ) == [1.0, 0.0]


def test_jsonl(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text(
        json.dumps({"prompt": "1+1", "answer": 2})
        + "\n\n"
        + json.dumps({"prompt": "2+2", "answer": "4"})
        + "\n"
    )
    problems = load_task(TaskConfig(source="jsonl", path=str(path)), seed=0).problems
    assert [(p.question, p.answer, p.score(f"Answer: {p.answer}.0")) for p in problems] == [
        ("1+1", "2", 1.0),
        ("2+2", "4", 1.0),
    ]


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
    with pytest.raises(UserError, match="rejects the parameters"):
        load_task(TaskConfig(datasets=(DatasetConfig("chain_sum", params={"min_terms": 0}),)), seed=0)
    with pytest.raises(UserError, match="no such file"):
        load_task(TaskConfig(source="jsonl", path="/nowhere.jsonl"), seed=0)
