"""What is said of a task's prompts before the first step."""

import json
import shutil

import pytest
from transformers import AutoTokenizer

from paceline.rl.errors import UserError
from paceline.rl.models.policies import fetch_policy
from paceline.rl.recipe import load_config
from paceline.rl.tasks import prompt_check
from paceline.rl.tasks.prompt_check import check_prompts, check_recipe
from paceline.rl.tasks.task import load_task
from tests.rl.tasks.test_prompts import GEMMA, PLAIN, QWEN3
from tests.support import train_here

SYSTEM = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1 + 1 ="}]


@pytest.fixture
def recipe(tmp_path):
    """A recipe over rows: the tiny policy, whose tokens are bytes; prompts and completions may have 160."""

    def make(rows, *overrides):
        path = tmp_path / "p.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return load_config(
            "configs/tiny.yaml",
            ["task.source=jsonl", f"task.path={path}", "rollout.prompts_per_step=2", *overrides],
        )

    return make


def tokenizer(template=None):
    found = AutoTokenizer.from_pretrained(fetch_policy("tiny-llama"))
    found.chat_template = template
    return found


def checked(config, template=None):
    task = load_task(config.task, config.seed)
    return task, check_prompts(task, config, tokenizer(template))


def rows_of(*lengths):
    return [{"prompt": chr(97 + i) * n, "answer": str(n)} for i, n in enumerate(lengths)]


def test_prompts_without_room_are_left_out_and_counted(recipe):
    """A prompt has a token more than it has letters: of 159 and 200 letters there is no room for a
    completion, of 140 for 19.
    """
    task, lines = checked(recipe(rows_of(9, 159, 140, 200, 158)))
    assert [len(p.question) for p in task.problems] == [9, 140, 158]
    assert lines == [
        "task: 2 of 5 prompts are too long for rollout.max_context (160 tokens, the longest has 201) and are "
        "left out",
        "task: 2 of 5 prompts leave fewer than rollout.max_tokens (24) tokens in rollout.max_context, so "
        "their completions are truncated, the shortest after 1 tokens",
    ]
    assert checked(recipe(rows_of(9, 8, 135)))[1] == []


def test_what_is_left_must_make_a_step(recipe):
    with pytest.raises(
        UserError,
        match=r"rollout\.prompts_per_step is 2, but the task has 1 usable .*\(task: 1 of 2 prompts are",
    ):
        checked(recipe(rows_of(9, 300)))
    with pytest.raises(
        UserError,
        match=r"max_context is 160, but every prompt has at least .* \(the shortest has 301\); raise it",
    ):
        checked(recipe(rows_of(300, 400)))
    gym = load_config(
        "configs/tiny.yaml", ["task.heldout=0.9", "task.size=20", "rollout.prompts_per_step=16"]
    )
    with pytest.raises(UserError, match=r"rollout\.prompts_per_step is 16, but the task has"):
        check_recipe(load_task(gym.task, gym.seed), gym)


def test_of_many_long_prompts_a_sample_is_tried_and_the_rest_when_chosen(recipe, monkeypatch):
    monkeypatch.setattr(prompt_check, "_MAX_ENCODED", 50)
    monkeypatch.setattr(prompt_check, "_SAMPLE_SIZE", 40)
    config = recipe(
        [{"prompt": f"{i:03} " + "x" * (200 if i % 4 == 0 else 135), "answer": "1"} for i in range(200)]
    )
    task, lines = checked(config)
    assert (
        len(task.rows) == 200 and lines[0].startswith("task: about ") and 30 < int(lines[0].split()[2]) < 70
    )
    asked = [p.question for step in range(25) for p in task.batch(step, 8)]
    assert all(len(q) < 160 for q in asked) and len(set(asked)) >= 140
    assert [p.question for p in task.batch(3, 8)] == [p.question for p in checked(config)[0].batch(3, 8)]
    assert all(len({p.key for p in task.batch(step, 8)}) == 8 for step in range(24))
    with pytest.raises(UserError, match="max_context is 160, but nearly all prompts have at least"):
        checked(recipe([{"prompt": f"{i:03} " + "x" * 200, "answer": "1"} for i in range(200)]))


def test_the_template_is_tried_with_every_sequence_of_roles(recipe):
    plain = {"prompt": "1 + 1 =", "answer": "2"}
    with pytest.raises(
        UserError, match=r"rejects a system message \(System role not supported\).*\(tried with p\.jsonl/3\)"
    ):
        checked(recipe([plain, plain, {"prompt": SYSTEM, "answer": "2"}]), GEMMA)
    with pytest.raises(UserError, match="rejects a system message"):
        checked(recipe([plain, plain], "task.system=Be kind."), GEMMA)
    silent = "{% for m in messages if m['role'] != 'system' %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(UserError, match="drops the system message"):
        checked(recipe([plain, plain], "task.system=Be kind."), silent)
    assert checked(recipe([plain, {"prompt": SYSTEM, "answer": "2"}], "task.system=Be kind."), PLAIN)[1] == []


def test_template_arguments_are_checked(recipe):
    asks = recipe(rows_of(5, 6), "task.chat_template_kwargs={enable_thinking: false}")
    assert checked(asks, QWEN3)[1] == []
    with pytest.raises(
        UserError, match="sets enable_thinking, which the policy's chat template does not read"
    ):
        checked(asks, PLAIN)
    with pytest.raises(
        UserError, match="sets enable_thinking, but the policy's tokenizer has no chat template"
    ):
        checked(asks)
    with pytest.raises(UserError, match="sets add_generation_prompt, which encoding a prompt decides"):
        recipe(rows_of(5, 6), "task.chat_template_kwargs={add_generation_prompt: false}")
    assert checked(recipe(rows_of(5, 6), "task.system=Be kind."))[1] == [
        "task.system is ignored: the policy's tokenizer has no chat template"
    ]


def test_repeated_prompts_are_counted_and_dropped_on_request(recipe):
    rows = [{"prompt": p, "answer": a} for p, a in (("1+1", "2"), ("2+2", "4"), ("1+1", "2"), (" 1+1", "3"))]
    task, lines = checked(recipe(rows))
    assert len(task.rows) == 4
    assert lines[0].startswith("task: 2 of 4 rows repeat the prompt of an earlier row; all are used")
    assert "1 of them give another answer, for example" in lines[0] and lines[0].endswith("p.jsonl:1")
    task, lines = checked(recipe(rows, "task.duplicates=drop"))
    assert [p.key for p in task.problems] == ["p.jsonl/1", "p.jsonl/2"] and "left out" in lines[0]


def test_a_dry_run_says_it_all(recipe, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("paceline.rl.run.try_tiny_step", lambda config: "")
    model = tmp_path / "model"
    shutil.copytree(fetch_policy("tiny-llama"), model)
    recipe([*rows_of(5, 6, 300), {"prompt": "aaaaa", "answer": "5"}])
    over = [
        "task.source=jsonl",
        f"task.path={tmp_path / 'p.jsonl'}",
        "rollout.prompts_per_step=2",
        f"policy.model={model}",
    ]
    train_here(monkeypatch, "configs/tiny.yaml", "--dry-run", *over)
    out = capsys.readouterr().out
    assert "1 of 4 rows repeat the prompt" in out and "1 of 4 prompts are too long" in out
    tokenizer(GEMMA).save_pretrained(model)
    with pytest.raises(SystemExit):
        train_here(monkeypatch, "configs/tiny.yaml", "--dry-run", "task.system=Be kind.", *over)
    assert (
        "the policy's chat template rejects a system message (System role not supported)"
        in capsys.readouterr().err
    )
    monkeypatch.setattr(prompt_check, "cached_policy", lambda model: tmp_path / "none")
    config = load_config("configs/tiny.yaml", over)
    assert "no tokenizer is available" in check_recipe(load_task(config.task, config.seed), config)[-1]


@pytest.mark.ci
def test_a_dry_run_without_the_policys_tokenizer_tries_conversations_all_the_same(
    recipe, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("PACELINE_CACHE", str(tmp_path / "cache"))
    turns = [*SYSTEM, {"role": "assistant", "content": "2"}, {"role": "user", "content": "2 + 2 ="}]
    recipe([{"prompt": turns, "answer": "4"}, {"prompt": "1 + 1 =", "answer": "2"}, *rows_of(3, 4, 5, 6)])
    over = [
        "task.source=jsonl",
        f"task.path={tmp_path / 'p.jsonl'}",
        "rollout.prompts_per_step=2",
        "task.heldout=0.3",
    ]
    model = "policy.model=Qwen/Qwen2.5-7B-Instruct"
    train_here(
        monkeypatch,
        "configs/tiny.yaml",
        "--dry-run",
        model,
        "task.chat_template_kwargs={enable_thinking: false}",
        *over,
    )
    out = capsys.readouterr().out
    assert (
        "no tokenizer is available" in out
        and "of 6 problems are held out" in out
        and "with a character tokenizer" in out
    )
