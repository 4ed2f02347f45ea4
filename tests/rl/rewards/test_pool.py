"""Scoring beside the rollouts: what hangs, dies or raises has a stated value and is counted."""

import contextlib
import json
import os
import signal
import socket
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from paceline.rl.config.task import DatasetConfig, RewardConfig, TaskConfig
from paceline.rl.errors import UserError
from paceline.rl.rewards.example import score_example
from paceline.rl.rewards.functions import RewardFunction, WeightedRewards
from paceline.rl.rewards.pool import ScoringPool, merge_spans
from paceline.rl.tasks.task import load_task

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
    data = (
        DatasetConfig("chain_sum", params={"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}),
    )
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
    assert merge_spans([(5.0, 6.0), (1.0, 3.0), (2.0, 4.0), (4.0, 4.5)]) == [(1.0, 4.5), (5.0, 6.0)]


def scorers() -> list[int]:
    """Process ids of this process's scorers."""
    found = []
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):
            if "paceline.rl.rewards.worker" in child.cmdline():
                found.append(child.pid)
    return found


def test_an_idle_scorer_that_is_killed_costs_nothing_and_a_busy_one_what_it_scored(odd):
    problems, others = (
        load_task(odd, seed=0).problems,
        set(scorers()),
    )  # of trainers that other tests have made
    with ScoringPool(replace(odd, score_seconds=30.0), 0, group_size=1) as pool:
        pool.wait_ready()
        (idle,) = set(scorers()) - others
        os.kill(idle, signal.SIGKILL)
        pool.add(0, problems[0], "four")
        assert pool.collect().values == {0: 4.0}
        (busy,) = set(scorers()) - others
        assert busy != idle
        for place, text in enumerate(("hang", "four")):
            pool.add(place, problems[0], text)
        time.sleep(0.5)
        os.kill(busy, signal.SIGKILL)
        scores = pool.collect()
        assert scores.values == {0: -1.0, 1: 4.0} and scores.errors == 1 and "SIGKILL" in scores.problem
    assert set(scorers()) <= others


SEVERAL = """
def length(completions, **_):
    return [len(text) for text in completions]

def of_sums(completions, dataset_name, completion_ids, **_):
    assert len(dataset_name) == len(completion_ids) == len(completions)
    return [sum(ids) if name == "sums" else None for name, ids in zip(dataset_name, completion_ids)]
"""


def test_several_rewards_are_weighted_and_none_is_left_out(tmp_path, monkeypatch):
    """TRL's convention: the sum of weight × reward over those that are not None; columns come as lists, by
    keyword.
    """
    (tmp_path / "several_rewards.py").write_text(SEVERAL)
    rows = [{"prompt": "1+1", "answer": "2", "dataset_name": name} for name in ("sums", "words")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    rewards = (RewardConfig("several_rewards:length", 0.5), RewardConfig("several_rewards:of_sums", 2.0))
    config = TaskConfig(source="jsonl", path="rows.jsonl", reward=rewards)
    problems = load_task(config, 0).problems
    with ScoringPool(config, 0, group_size=2) as pool:
        for place, (text, ids) in enumerate((("abcd", [1, 2]), ("ab", [3]), ("abcd", [1, 2]), ("ab", [3]))):
            pool.add(place, problems[place // 2], text, ids)
        scores = pool.collect()
    assert (
        scores.values == {0: 0.5 * 4 + 2.0 * 3, 1: 0.5 * 2 + 2.0 * 3, 2: 2.0, 3: 1.0}
        and scores.problem is None
    )
    assert scores.parts == {"length": [4, 2, 4, 2], "of_sums": [3, 3, None, None]}


def test_a_completion_that_is_evaluated_reaches_neither_files_nor_the_network(tmp_path):
    """reasoning-gym's scorer of spiral_matrix evaluates answers with Python's ``eval``."""
    config = TaskConfig(size=1, datasets=(DatasetConfig("spiral_matrix"),))
    problem = load_task(config, 0).problems[0]
    listener = socket.create_server(("127.0.0.1", 0))
    listener.settimeout(0.2)
    written, port = tmp_path / "written", listener.getsockname()[1]
    attacks = [
        f"__import__('pathlib').Path({str(written)!r}).write_text('x')",
        f"__import__('socket').create_connection(('127.0.0.1', {port}), 1)",
        f"__import__('os').kill({os.getpid()}, 9)",
    ]
    with ScoringPool(config, 0, group_size=1) as pool:
        for place, attack in enumerate([*attacks, problem.answer]):
            pool.add(place, problem, f"Answer: {attack}")
        scores = pool.collect()
    assert not written.exists()
    with pytest.raises(TimeoutError):
        listener.accept()
    listener.close()
    assert scores.values[3] == 1.0 and max(scores.values[place] for place in range(3)) < 1.0
    problem.score(f"Answer: {attacks[0]}")  # in this process, which is not confined, it does write
    assert written.exists()


def test_a_machine_that_cannot_confine_is_named_or_refused(odd, monkeypatch):
    monkeypatch.setattr(
        "paceline.rl.rewards.pool.missing_confinement", lambda: ["file writes (the kernel lacks Landlock)"]
    )
    with pytest.raises(UserError, match="cannot keep scorers from file writes"):
        ScoringPool(replace(odd, sandbox="require"), 0, 2)
    with ScoringPool(odd, 0, 2) as pool:
        assert pool.notice is not None and "file writes" in pool.notice
    with ScoringPool(replace(odd, sandbox="off"), 0, 2) as pool:
        assert pool.notice is None


@pytest.mark.ci
def test_an_example_is_scored_before_the_run(odd):
    problem = load_task(odd, seed=0).problems[0]
    answer = f"Answer: {problem.answer}"
    (said,) = score_example(problem, odd, 0, 2)
    assert said == f"reward: for the first problem, {answer!r} scores {len(answer)}, 'I do not know.' 14"
    (Path.cwd() / "bad_example.py").write_text("def reward(**_):\n    raise ValueError('no such unit')\n")
    with pytest.raises(UserError, match=r"no score to 2 of 2 example completions: .*no such unit"):
        score_example(problem, replace(odd, reward="bad_example:reward"), 0, 2)


def test_tensors_and_arrays_are_rewards():
    for returned in (
        torch.tensor([3, 5]),
        torch.tensor([3.0, 5.0], dtype=torch.bfloat16),
        [torch.tensor(3.0), np.float64(5)],
    ):
        rewards = WeightedRewards([RewardFunction("f", 1.0, lambda returned=returned, **_: returned)])
        assert rewards(2, {})[0] == [3.0, 5.0]
