"""Which problems are asked, and learning rates over a run."""

import math
import random
from collections import Counter

import pytest

from paceline.rl.algorithms.advantages import uniform_groups
from paceline.rl.algorithms.lr_schedule import rate_at
from paceline.rl.config.task import CurriculumConfig
from paceline.rl.errors import UserError
from paceline.rl.recipe import load_config
from paceline.rl.tasks.sampler import Curriculum, Epochs, create_prompt_sampler
from paceline.rl.tasks.task import Problem, Task, load_task


def task(difficulties=(1.0, 1.0, 2.0, 3.0, 3.0, 3.0)) -> Task:
    return Task(
        [Problem(f"{i}", f"q{i}", "", lambda text: 0.0, {}, "", d) for i, d in enumerate(difficulties)],
        seed=0,
    )


def test_the_target_follows_the_reward_by_hand():
    """T = 2, η = 1, α = 2, β = 1/2: reward 1 gives tanh(1) = 0.7616 more, reward 0 as much less, and the ends
    are the problems'.
    """
    choice = Curriculum(task(), 0, CurriculumConfig(start=2.0))
    choice.observe(1.0)
    assert choice.target == pytest.approx(2 + math.tanh(1))
    choice.observe(0.0)
    assert choice.target == pytest.approx(2.0)
    for _ in range(5):
        choice.observe(1.0)
    assert choice.target == 3.0
    again = Curriculum(task(), 0, CurriculumConfig(start=1.0))
    again.load_state(choice.state())
    assert again.target == 3.0


def test_the_nearest_are_asked_and_equals_in_turn():
    choice = Curriculum(task(), 0, CurriculumConfig(start=3.0))
    asked = Counter(p.key for step in range(60) for p in choice.choose(step, 2))
    assert set(asked) == {"3", "4", "5"} and min(asked.values()) > 20
    assert [p.key for p in choice.choose(7, 2)] == [p.key for p in choice.choose(7, 2)]  # every rank alike
    assert {p.difficulty for p in choice.choose(0, 4)} == {3.0, 2.0}


def test_epochs_ask_all_and_further_prompts_differ_by_rank():
    choice = create_prompt_sampler(task(), 0, None)
    assert isinstance(choice, Epochs)
    assert {p.key for step in range(3) for p in choice.choose(step, 2)} == {str(i) for i in range(6)}
    drawn = [tuple(p.key for p in choice.more(0, 4, round_, rank)) for round_ in (1, 2) for rank in (0, 1)]
    assert len(set(drawn)) > 1 and all(len(set(d)) == 4 for d in drawn)
    assert len(choice.more(0, 99, 1, 0)) == 6


def test_difficulties_come_from_the_recipe_and_the_data(tmp_path):
    problems = load_task(load_config("configs/curriculum.yaml").task, 0).problems
    assert Counter(p.difficulty for p in problems) == {1.0: 30, 2.0: 30, 3.0: 30, 4.0: 30}
    lines = tmp_path / "p.jsonl"
    lines.write_text('{"prompt": "1+1", "answer": "2", "difficulty": 7}\n{"prompt": "x", "answer": "y"}\n')
    jsonl = load_config("configs/tiny.yaml", ["task.source=jsonl", f"task.path={lines}"]).task
    assert [p.difficulty for p in load_task(jsonl, 0).problems] == [7.0, 0.0]
    lines.write_text('{"prompt": "1+1", "answer": "2", "difficulty": "hard"}\n')
    with pytest.raises(UserError, match=r"p\.jsonl:1: difficulty is 'hard'; write a number"):
        load_task(jsonl, 0)


def test_the_nearest_are_those_of_a_sorted_list():
    """Against sorting all problems by their distance: the same distances in the same order, for targets
    between and on levels.
    """
    chance = random.Random(0)
    difficulties = [float(chance.randrange(12)) for _ in range(60)]
    for target in (0.0, 3.5, 4.0, 6.2, 11.0):
        choice = Curriculum(task(difficulties), 0, CurriculumConfig(start=target))
        asked = choice.choose(0, 40)
        assert len({p.key for p in asked}) == 40
        assert [abs(p.difficulty - target) for p in asked] == sorted(abs(d - target) for d in difficulties)[
            :40
        ]
    halves = Curriculum(task([1.0] * 30 + [2.0] * 30), 0, CurriculumConfig(start=1.5))
    assert 10 < sum(p.difficulty == 1.0 for p in halves.choose(0, 30)) < 20


def test_groups_that_say_nothing():
    assert uniform_groups([1, 1, 0, 1, 0.5, 0.5], 2) == {0, 2}


def test_rates_by_hand():
    """Over ten steps without a rise: half way linear 1/2, cosine 1/2, REX (1/2) / (3/4) = 2/3."""
    assert [rate_at(5, 10, 1, s) for s in ("constant", "linear", "cosine", "rex")] == pytest.approx(
        [1, 0.5, 0.5, 2 / 3]
    )
    assert [rate_at(0, 10, 1, s) for s in ("linear", "cosine", "rex")] == [1.0, 1.0, 1.0]
    assert [rate_at(step, 10, 4, "linear") for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert rate_at(99, 10, 4, "rex") == 0.0
