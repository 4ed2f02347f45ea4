"""Every bad reward has the outcome that is written beside it, and leaves scoring as it was."""

from pathlib import Path

import pytest

from paceline.rl.config.task import TaskConfig
from paceline.rl.errors import UserError
from paceline.rl.rewards.pool import ScoringPool
from paceline.rl.tasks.task import load_task
from tests.faults.bad_rewards import CASES, COMPLETIONS, LENGTHS, BadReward

# Calls the module that a problem names, so that one pool tries all of them.
DISPATCHER = """
import importlib, inspect


def reward(case, **columns):
    call = importlib.import_module(case[0]).reward
    call = call() if isinstance(call, type) else call
    names = inspect.signature(call).parameters
    taken = columns if "columns" in names else {name: columns[name] for name in names if name in columns}
    return call(**taken)
"""


@pytest.fixture
def modules(tmp_path, monkeypatch) -> Path:
    (tmp_path / "dispatcher.py").write_text(DISPATCHER)
    for case in CASES:
        (tmp_path / f"{case.name}.py").write_text(case.source)
    good = tmp_path / "good.py"
    good.write_text("def reward(completions):\n    return [len(text) for text in completions]\n")
    rows = [
        f'{{"prompt": "?", "answer": "0", "case": "{name}"}}\n'
        for name in ["good", *(case.name for case in CASES)]
    ]
    (tmp_path / "cases.jsonl").write_text("".join(rows))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def task(folder: Path, module: str) -> TaskConfig:
    return TaskConfig(
        source="jsonl",
        path=str(folder / "cases.jsonl"),
        reward=f"{module}:reward",
        score_seconds=0.8,
        score_failed=-1,
    )


@pytest.mark.ci
def test_what_bad_rewards_do_when_they_are_called(modules, capfd):
    config = task(modules, "dispatcher")
    good, *problems = load_task(config, seed=0).problems
    with ScoringPool(config, 0, group_size=2) as pool:
        pool.wait_ready()
        for case, problem in zip(CASES, problems, strict=True):
            if case.expected is None:
                continue
            for place, asked in enumerate((problem, problem, good, good)):
                pool.add(place, asked, COMPLETIONS[place % 2])
            scores = pool.collect()
            wanted = [*case.expected, *LENGTHS]
            assert scores.values == {i: -1.0 if w is None else w for i, w in enumerate(wanted)}, (
                case.name,
                scores,
            )
            missing = wanted.count(None)
            assert (scores.timeouts, scores.errors) == ((missing, 0) if case.slow else (0, missing)), (
                case.name
            )
            assert (
                (case.says in str(scores.problem) and "\n" not in str(scores.problem))
                if case.says
                else scores.problem is None
            )
    assert not (modules / "written").exists()
    printed = capfd.readouterr()
    assert 60_000 < printed.err.count("x") < 70_000 and "Traceback" not in printed.err


@pytest.mark.ci
@pytest.mark.parametrize(
    "case", [case for case in CASES if case.expected is None], ids=lambda case: case.name
)
def test_what_is_no_reward_is_refused_in_a_line(modules, case: BadReward):
    with ScoringPool(task(modules, case.name), 0, group_size=2) as pool, pytest.raises(UserError) as refusal:
        pool.wait_ready()
    assert case.says in str(refusal.value) and "\n" not in str(refusal.value)
