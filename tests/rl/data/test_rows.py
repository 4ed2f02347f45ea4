"""Rows in the shapes that people's data has: what is asked, what is the gold, and what is refused."""

import pytest

from paceline.rl.config.task import ColumnsConfig
from paceline.rl.data.conversations import question_of, with_ending
from paceline.rl.data.row_error import RowError
from paceline.rl.data.rows import read_row

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 2 + 2?"}]
GSM8K = "She has 3 + 4 = <<3+4=7>>7 pens now.\nThat is 7 pens.\n#### 7"
MATH = r"We add: $\frac{1}{4}+\frac{1}{4}=\frac{2}{4}$, so the answer is $\boxed{\frac{1}{2}}$."


def read(entry, needs_gold=True, **columns):
    return read_row(entry, ColumnsConfig(**columns), needs_gold)


@pytest.mark.parametrize(
    ("entry", "question", "gold"),
    [
        ({"prompt": "1+1", "answer": 2}, "1+1", "2"),
        ({"question": "How many pens?", "answer": GSM8K}, "How many pens?", "7"),
        (
            {"problem": "Add.", "level": "Level 3", "type": "Algebra", "solution": MATH},
            "Add.",
            r"\frac{1}{2}",
        ),
        ({"problem": "Add.", "solution": "prose\nof two lines", "answer": "1/2"}, "Add.", "1/2"),
        ({"prompt": CHAT, "answer": "4"}, "What is 2 + 2?", "4"),
        (
            {
                "prompt": {"role": ["system", "user"], "content": ["Be brief.", "What is 2 + 2?"]},
                "answer": "4",
            },
            "What is 2 + 2?",
            "4",
        ),
        ({"messages": CHAT, "answer": "4"}, "What is 2 + 2?", "4"),
        ({"messages": "What is 2 + 2?", "answer": "4"}, "What is 2 + 2?", "4"),
        (
            {
                "data_source": "math_dapo",
                "prompt": CHAT,
                "ability": "MATH",
                "reward_model": {"ground_truth": "34", "style": "rule"},
                "extra_info": {"index": "a1"},
            },
            "What is 2 + 2?",
            "34",
        ),
        ({"prompt": CHAT, "solution": "$4$"}, "What is 2 + 2?", "4"),
        (
            {"problem": "p", "messages": [*CHAT, {"role": "assistant", "content": "4"}], "answer": "4"},
            "p",
            "4",
        ),
        ({"prompt": None, "question": "q", "answer": None, "ground_truth": "4"}, "q", "4"),
    ],
)
def test_known_shapes(entry, question, gold):
    row = read(entry)
    assert (question_of(row.turns), row.gold) == (question, gold)


@pytest.mark.parametrize(
    ("value", "gold"),
    [
        (GSM8K, "7"),
        ("so\n#### 1,450,000\n", "1,450,000"),
        (MATH, r"\frac{1}{2}"),
        (r"\boxed{\left\{1, 2\right\}}", r"\left\{1, 2\right\}"),
        (r"first $\boxed{1}$, then $\fbox{x_{2}}$", "x_{2}"),
        (r"$\boxed 5$ apples", "5"),
        (r"$\frac12$", r"\frac12"),
        ("$$x$$", "x"),
        (r"\( 3 \)", "3"),
        ("\\begin{pmatrix}\n  1 \\\\ 2\n\\end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"),
        ("$1$ or $2$", "$1$ or $2$"),
        (" east ", "east"),
        (0.5, "0.5"),
        (0, "0"),
    ],
)
def test_golds_are_taken_out_of_solutions(value, gold):
    assert read({"prompt": "q", "answer": value}).gold == gold


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (None, "answer is null"),
        ([], "answer is a list"),
        (["1/2", "0.5"], "answer is a list"),
        ({"value": 4}, "answer is an object"),
        (True, "answer is true"),
        (float("nan"), "answer is the number nan"),
        ("", "answer holds no answer"),
        ("  ", "answer holds no answer"),
        ("thought\n####  ", "answer holds no answer"),
        (r"so $\boxed{}$", "answer holds no answer"),
        (r"so $\boxed{\frac{1}{2}", "not closed"),
    ],
)
def test_golds_that_nothing_can_match_are_refused(answer, says):
    with pytest.raises(RowError, match=says):
        read({"prompt": "q", "answer": answer})


def test_a_solution_that_marks_nothing_is_refused():
    with pytest.raises(RowError, match="solution marks no answer"):
        read({"problem": "q", "solution": "First we add.\nThen we are done: it is 5."})


def test_a_reward_function_of_ones_own_needs_no_gold():
    assert read({"prompt": "q"}, needs_gold=False).gold == ""
    assert read({"prompt": "q", "answer": ["a", "b"]}, needs_gold=False).gold == "['a', 'b']"
    assert read({"prompt": "q", "answer": GSM8K}, needs_gold=False).gold == GSM8K


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        (7, "prompt is the number 7"),
        (True, "prompt is true"),
        ({"role": "user", "content": "hi"}, "prompt is an object"),
        ([], "prompt is an empty list"),
        ("  ", "prompt is blank text"),
        (["hi"], r"prompt\[0\] is text"),
        ([{"from": "human", "value": "hi"}], r"prompt\[0\] has the keys from, value; write role and content"),
        (
            [{"role": "human", "content": "hi"}],
            r"prompt\[0\] has the role 'human'; write one of system, user, assistant",
        ),
        ([{"role": "system", "content": "hi"}], "prompt has no user turn"),
        ([{"role": "user", "content": None}], r"prompt\[0\].content is null"),
        (
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]}],
            "a part of type image",
        ),
        (
            [*CHAT, {"role": "assistant", "content": "x", "tool_calls": [{"name": "f"}]}],
            r"prompt\[2\] calls a tool",
        ),
        ("[{'role': 'user', 'content': 'hi'}]", "prompt is text that holds a list of messages"),
        ('[{"content": "hi", "role": "user"}]', "prompt is text that holds a list of messages"),
    ],
)
def test_prompts_that_are_no_text_and_no_conversation_are_refused(prompt, says):
    with pytest.raises(RowError, match=says):
        read({"prompt": prompt, "answer": "4"})


def test_turns_are_kept_with_what_they_hold():
    turns = [
        *CHAT,
        {"role": "assistant", "content": "4", "name": None},
        {"role": "user", "content": [{"type": "text", "text": "And 3?"}]},
    ]
    row = read({"prompt": turns, "answer": "3"})
    assert row.conversational and [t["role"] for t in row.turns] == ["system", "user", "assistant", "user"]
    assert row.turns[2:] == ({"role": "assistant", "content": "4"}, {"role": "user", "content": "And 3?"})
    assert [t["content"] for t in with_ending(row.turns[:3], " Think.")] == [
        "Be brief.",
        "What is 2 + 2? Think.",
        "4",
    ]


def test_a_conversation_that_holds_its_own_answer_is_refused_unless_it_is_wanted():
    entry = {"messages": [*CHAT, {"role": "assistant", "content": "It is"}], "answer": "4"}
    with pytest.raises(RowError, match="messages ends with an assistant turn"):
        read(entry)
    assert len(read(entry, prompt="messages").turns) == 3


def test_columns_are_mapped_by_dotted_paths():
    entry = {"task": {"text": "1+1"}, "golds": ["2", "3"], "a.b": 5}
    row = read(entry, prompt="task.text", answer="golds.0", difficulty="a.b")
    assert (question_of(row.turns), row.gold, row.difficulty) == ("1+1", "2", 5.0)
    with pytest.raises(
        RowError, match=r"no column gold \(task\.columns\.answer\); .* columns: task, golds, a\.b"
    ):
        read(entry, prompt="task.text", answer="gold")
    with pytest.raises(RowError, match=r"no column hard \(task\.columns\.difficulty\)"):
        read(entry, prompt="task.text", answer="golds.0", difficulty="hard")
    with pytest.raises(
        RowError,
        match=(
            r"no prompt and no answer; .* name the columns in task\.columns \(the row has task, golds, "
            r"a\.b\)"
        ),
    ):
        read(entry)


def test_difficulties():
    assert [
        read({"prompt": "q", "answer": "1", **more}).difficulty
        for more in ({"difficulty": 2}, {"level": "Level 4"}, {})
    ] == [
        2,
        4,
        0,
    ]
    assert read({"prompt": "q", "answer": "1", "level": "Level ?"}).difficulty == 0
    assert read({"prompt": "q", "answer": "1", "level": "Level 5"}, difficulty="level").difficulty == 5
    with pytest.raises(RowError, match="difficulty is True"):
        read({"prompt": "q", "answer": "1", "difficulty": True})
