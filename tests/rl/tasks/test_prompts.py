"""Problems put into chat templates: whole conversations, template arguments, and templates that refuse."""

from dataclasses import replace

import pytest
from transformers import AutoTokenizer

from paceline.rl.config.task import TaskConfig
from paceline.rl.errors import UserError
from paceline.rl.generation.groups import Groups
from paceline.rl.models.policies import fetch_policy
from paceline.rl.recipe import load_config
from paceline.rl.tasks.problems import Problem
from paceline.rl.tasks.prompts import encode_problem, encode_prompt
from paceline.rollout import SamplingParams

PLAIN = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}{% if add_generation_prompt "
    "%}[assistant]{% endif %}"
)
QWEN3 = PLAIN + "{% if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}"
GEMMA = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    + PLAIN
)
TURNS = (
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "3+3?"},
)


@pytest.fixture
def tokenizer():
    return AutoTokenizer.from_pretrained(fetch_policy("tiny-llama"))


def problem(messages=None, question="hi") -> Problem:
    return Problem("p/1", question, "", lambda text: 0.0, {}, "", messages=messages)


def text(tokenizer, asked, template, ending="", **task) -> str:
    tokenizer.chat_template = template
    return tokenizer.decode(encode_problem(tokenizer, asked, TaskConfig(**task), ending))


def test_a_conversation_is_asked_whole(tokenizer):
    assert text(tokenizer, problem(TURNS), PLAIN) == "[user]2+2?[assistant]4[user]3+3?[assistant]"
    assert (
        text(tokenizer, problem(TURNS), PLAIN, " Think.")
        == "[user]2+2?[assistant]4[user]3+3? Think.[assistant]"
    )
    assert (
        text(tokenizer, problem(), PLAIN, " Think.", system="Be kind.")
        == "[system]Be kind.[user]hi Think.[assistant]"
    )


def test_the_recipes_system_message_is_for_problems_without_one(tokenizer):
    own = ({"role": "system", "content": "Be brief."}, *TURNS[:1])
    assert text(tokenizer, problem(own), PLAIN, system="Be kind.") == "[system]Be brief.[user]2+2?[assistant]"
    assert (
        text(tokenizer, problem(TURNS[:1]), PLAIN, system="Be kind.")
        == "[system]Be kind.[user]2+2?[assistant]"
    )


def test_a_last_turn_of_the_assistants_is_continued(tokenizer):
    assert text(tokenizer, problem(TURNS[:2]), PLAIN) == "[user]2+2?[assistant]4"


def test_arguments_reach_the_template(tokenizer):
    assert text(tokenizer, problem(), QWEN3) == "[user]hi[assistant]"
    assert (
        text(tokenizer, problem(), QWEN3, chat_template_kwargs={"enable_thinking": False})
        == "[user]hi[assistant]<think></think>"
    )


def test_a_template_that_refuses_is_a_line(tokenizer):
    with pytest.raises(
        UserError, match=r"rejects a system message \(System role not supported\); set task\.system: null"
    ):
        text(tokenizer, problem(), GEMMA, system="Be kind.")
    with pytest.raises(UserError, match="rejects a system message"):
        encode_prompt(tokenizer, "hi", "Be brief.")
    alternate = (
        "{% if messages | length == 3 %}{{ raise_exception('roles must\nalternate') }}{% endif %}" + PLAIN
    )
    with pytest.raises(UserError, match=r"rejects the roles user → assistant → user: roles must alternate$"):
        text(tokenizer, problem(TURNS), alternate)
    with pytest.raises(UserError, match=r"cannot be applied: .*nothing"):
        text(tokenizer, problem(), "{{ messages[0].content.nothing() }}", system="Be kind.")


def test_without_a_template_one_turn_is_plain_text_and_several_are_refused(tokenizer):
    assert (
        text(tokenizer, problem(TURNS[:1], "2+2?"), None)
        == text(tokenizer, problem(question="2+2?"), None)
        == "2+2?\n"
    )
    with pytest.raises(UserError, match=r"p/1 is a conversation of several turns, .* no chat template"):
        text(tokenizer, problem(TURNS), None)


def test_special_tokens_are_the_templates_alone(tokenizer):
    from tokenizers import processors

    tokenizer.add_special_tokens({"bos_token": "<s>"})
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        "<s> $A", None, [("<s>", tokenizer.bos_token_id)]
    )
    for template in ("{{ bos_token }}" + PLAIN, None):
        tokenizer.chat_template = template
        assert encode_problem(tokenizer, problem(), TaskConfig()).count(tokenizer.bos_token_id) == 1


def test_a_problem_that_a_step_asks_again_has_other_seeds(tokenizer):
    """Or its samples would be copies, token for token; they still share drafts."""
    config = load_config("configs/tiny.yaml", ["rollout.group_size=3"])
    requests = Groups(config, None, tokenizer, SamplingParams()).requests(
        [problem(), replace(problem(), repeat=1)], step=0
    )
    assert len({r.seed for r in requests}) == 6 and {r.group for r in requests} == {"p/1"}
