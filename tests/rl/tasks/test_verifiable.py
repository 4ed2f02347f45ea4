"""Marked answers: never less than math-verify gives for the whole text, and a wrong one is not made right."""

import pytest
from math_verify import parse, verify

from paceline.rl.config.task import DatasetConfig, TaskConfig
from paceline.rl.tasks.task import load_task
from paceline.rl.tasks.verifiable import math_score, reasoning_gym_score

RIGHT = [
    *(
        ("18", f"Answer: {text}")
        for text in ("18", "18.", "18 dollars", "$18 per day", "He has 18 pens.", "the total is 18")
    ),
    *(
        ("18", f"Answer: {text}")
        for text in ("**18**", "*18*", "__18__", "`18`", '"18"', "<b>18</b>", "**18** eggs", "✅ 18", "18 😀")
    ),
    *(
        ("18", f"Answer: {text}")
        for text in ("\\(18\\)", "\\[18\\]", "$18$", "$$18$$", "\\boxed{18}", "$18 \\text{ cm}$", "18 cm^2")
    ),
    *(
        ("18", f"Answer: {text}")
        for text in ("x = 18", "3 + 15 = 18", "(18)", "36/2", "18 or 18.0", "\\[\n18\n\\]", "$$\n18\n$$")
    ),
    *(
        ("18", text)
        for text in (
            "**Answer:** 18",
            "**Answer**: 18",
            "**Answer: 18**",
            "Answer:\n18",
            "20. Answer: 18",
            "it is 18",
        )
    ),
    ("1/2", "Answer: 1/2 of the cake"),
    ("1/2", "Answer: $\\frac{1}{2}$ cups"),
    ("-18", "Answer: −18"),
    ("8", "Answer: 2**3"),
    ("1000", "Answer: 1,000 dollars"),
    ("18, 20", "Answer: 20 and 18"),
    ("x = 3 or x = 5", "Answer: x = 5 or x = 3"),
    ("\\sqrt{2}", "Answer: sqrt(2)"),
    ("(B)", "Answer: B"),
    ("Paris", "Answer: **paris**."),
    ("Paris", "It is \\boxed{Paris}"),
    *(
        (gold, f"Answer: {gold}")
        for gold in ("east", "(B)", "B", "New York", "12:00", "yes", "x = 3 or x = 5", "a,b,c", "5 cm")
    ),
]
WRONG = [
    *(
        ("18", f"Answer: {text}")
        for text in ("18 or 20", "20 or 18", "18 dollars or 20 dollars", "**18** or **20**", "18, 20", "20")
    ),
    *(
        ("18", f"{text} Answer: 20")
        for text in ("18.", "$18$,", "\\boxed{18}", "Answer: 18.\n", "18 * 1 = 18.")
    ),
    ("18", "Answer: -18"),
    ("18", "Answer: 18/20"),
    ("20", "Answer: 18 or 20"),
    ("east", "Answer: seat"),
    ("(B)", "Answer: (C)"),
    ("12:00", "Answer: 13:00"),
    ("(1, 2)", "Answer: [1, 2]"),
    ("23", "Answer: 2**3"),
]


@pytest.mark.parametrize(("gold", "text"), RIGHT)
def test_right_answers(gold, text):
    assert math_score(gold)(text) == 1.0


@pytest.mark.parametrize(("gold", "text"), WRONG)
def test_wrong_answers(gold, text):
    assert math_score(gold)(text) == 0.0


@pytest.mark.ci
def test_never_less_than_math_verify_where_one_answer_is_given():
    units = (
        "",
        " dollars",
        "%",
        " km/h",
        " m^2",
        "°",
        " out of 20",
        " (eighteen)",
        "!",
        ", that is, eighteen",
        " \\text{ cm}",
    )
    for unit in units:
        for before in ("", "about ", "the total is ", "= ", "$x$ is ", "€", "n = "):
            text = f"First 7, then 9. Answer: {before}18{unit}"
            assert math_score("18")(text) >= float(verify(parse("$18$"), parse(text))), text


def test_a_reference_answer_is_parsed_when_it_is_needed(monkeypatch):
    monkeypatch.setattr("math_verify.parse", lambda text: pytest.fail("parsed"))
    scores = [math_score(str(gold)) for gold in range(1000)]
    monkeypatch.undo()
    assert scores[18]("Answer: 18") == 1.0


def test_markup_does_not_cost_a_data_sets_own_scorer_its_answer():
    problem = load_task(TaskConfig(size=1, datasets=(DatasetConfig("chain_sum"),)), 0).problems[0]
    assert [problem.score(f"Answer: {mark}{problem.answer}{mark}") for mark in ("", "**", "`", "$")] == [
        1.0
    ] * 4

    class Exact:
        def score_answer(self, answer: str, entry: dict) -> float:
            return float(answer == "**x**")

    assert reasoning_gym_score(Exact(), {})("Answer: **x**") == 1.0
