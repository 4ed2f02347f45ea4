"""Scoring beside the rollouts: what hangs, dies or raises has a stated value and is counted."""

import time
from dataclasses import replace

import pytest

from rl.rewards.pool import ScoringPool, joined
from rl.task_config import DatasetConfig, TaskConfig
from rl.tasks import load_task

REWARDS = """
import os, time

def odd(prompts, completions, problem, answer):
    text = completions[0]
    if text == "hang":
        time.sleep(60)
    if text == "die":
        os._exit(1)
    if text == "raise":
        raise ValueError("no such unit")
    if text == "words":
        return ["a lot"]
    if text == "nan":
        return [float("nan")] * len(completions)
    if text == "few":
        return []
    return [float(len(c)) for c in completions]
"""


def task(**options) -> TaskConfig:
    data = (DatasetConfig("chain_sum", params={"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}),)
    return TaskConfig(size=4, datasets=data, **options)


def test_problems_score_as_they_do_here():
    config = task()
    problems = load_task(config, seed=3).problems
    with ScoringPool(config, 3, group_size=2) as pool:
        texts = [f"Answer: {answer}" for problem in problems for answer in (problem.answer, -1)]
        for i, text in enumerate(texts):
            pool.add(i, problems[i // 2], text)
        scores = pool.collect()
        assert scores.values == {i: problems[i // 2].score(text) for i, text in enumerate(texts)}
        assert scores.values[0] == 1.0 and scores.problem is None
        assert scores.busy and all(begin < end for begin, end in scores.busy)
        assert pool.collect().values == {}


@pytest.fixture
def odd(tmp_path, monkeypatch) -> TaskConfig:
    (tmp_path / "odd_reward.py").write_text(REWARDS)
    monkeypatch.chdir(tmp_path)
    return task(reward="odd_reward:odd", score_seconds=0.5, score_failed=-1.0)


@pytest.mark.parametrize("way", ["hang", "die", "raise", "words", "nan", "few"])
def test_a_scorer_that_fails_is_counted_and_the_rest_goes_on(odd, way):
    problems = load_task(odd, seed=0).problems
    with ScoringPool(odd, 0, group_size=2) as pool:
        for i, text in enumerate([way, "x", "four", "seven77"]):
            pool.add(i, problems[i // 2], text)
        begin = time.monotonic()
        scores = pool.collect()
        assert time.monotonic() - begin < 20
    assert scores.values == {0: -1.0, 1: -1.0, 2: 4.0, 3: 7.0}
    assert (scores.timeouts, scores.errors) == ((2, 0) if way == "hang" else (0, 2))
    assert scores.problem and "\n" not in scores.problem
    assert way != "raise" or "ValueError: no such unit" in scores.problem


def test_groups_go_together_in_order_also_where_one_failed(odd):
    problems = load_task(odd, seed=0).problems
    with ScoringPool(odd, 0, group_size=3) as pool:
        for i, text in ((5, "333333"), (2, "22"), (3, "1"), (0, "4444")):  # 1 and 4 failed
            pool.add(i, problems[i // 3], text)
        assert pool.collect().values == {0: 4.0, 2: 2.0, 3: 1.0, 5: 6.0}


def test_a_step_waits_no_longer_than_its_deadline(odd):
    problems = load_task(odd, seed=0).problems
    with ScoringPool(replace(odd, score_seconds=30.0, score_deadline=5.0), 0, group_size=1) as pool:
        pool.add(0, problems[0], "warm")
        pool.collect()  # the worker is up
        for i in range(4):
            pool.add(i, problems[0], "hang")
        begin = time.monotonic()
        scores = pool.collect()
        assert time.monotonic() - begin < 12 and scores.timeouts == 4
        for _ in range(10):  # the worker takes its time to come up again
            pool.add(0, problems[0], "again")
            if (again := pool.collect().values) == {0: 5.0}:
                break
        assert again == {0: 5.0}


def test_when_something_was_scored():
    """Overlapping spans are one; what follows after a pause is another."""
    assert joined([(5.0, 6.0), (1.0, 3.0), (2.0, 4.0), (4.0, 4.5)]) == [(1.0, 4.5), (5.0, 6.0)]
