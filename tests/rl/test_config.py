"""Recipes are strict, and say what to write instead."""

import dataclasses

import pytest

from rl.config import RunConfig, load_config, to_dict
from rl.errors import UserError
from rl.strict import parse

TINY = "configs/tiny.yaml"


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("rollout.group_sise=4", "did you mean rollout.group_size"),
        ("polcy.model=x", "did you mean policy"),
        ("rollout.group_size=many", "rollout.group_size is 'many'; write a value of type int"),
        ("rollout.group_size=true", "type int"),
        ("rollout.group_size=1", "at least 2 samples"),
        ("rollout.temperature=0", "rollout.temperature is 0"),
        ("rollout.temperature=-1", "rollout.temperature"),
        ("rollout.temperature=.nan", "rollout.temperature"),
        ("rollout.max_tokens=0", "rollout.max_tokens is 0"),
        ("rollout.max_tokens=500", "max_context must exceed"),
        ("rollout.top_p=2.0", "rollout.top_p"),
        ("speculation.drafters=[sufix]", "did you mean suffix"),
        ("speculation.verifier=block", "likeliest drafts need none"),
        ("speculation.draw=replacement", "joins drafts of likeliest tokens"),
        ("speculation.strategy=eagle3", "write plain, <drafter>:<depth>"),
        ("speculation.max_nodes=64", "write 1 to 63"),
        ("speculation.drafters=[composite]", "list those too"),
        ("speculation.drafters=[draft_model]", "speculation.draft_model"),
        ("policy.mixed_precision=fp16", "write one of bf16, no"),
        ("task.datasets=[]", "task.datasets is empty"),
        ("task.source=jsonl", "task.path"),
        ("task.datasets=[{nam: chain_sum}]", "did you mean task.datasets[0].name"),
        ("policy=3", "write a section"),
        ("steps", "write key=value"),
        ("steps.deep=1", "is a value, not a section"),
    ],
)
def test_errors_name_the_key(override, says):
    with pytest.raises(UserError) as error:
        load_config(TINY, [override])
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_overrides_and_yaml_floats(tmp_path):
    config = load_config(TINY, ["update.lr=2e-6", "rollout.stop_strings=['x']", "policy.warmup={examples: 3}"])
    assert config.update.lr == 2e-6
    assert config.rollout.stop_strings == ("x",)
    assert config.policy.warmup.examples == 3


def test_a_kept_config_reads_back():
    config = load_config("configs/quickstart.yaml")
    assert parse(RunConfig, to_dict(config), where="kept") == config
    assert dataclasses.is_dataclass(config.policy.warmup)


@pytest.mark.parametrize(("text", "says"), [("- 1", "mapping"), ("a: [", "not valid YAML"), (None, "no such recipe")])
def test_unreadable_recipes(tmp_path, text, says):
    path = tmp_path / "recipe.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=says):
        load_config(path)


def test_a_draft_vocabulary_larger_than_the_targets_is_refused():
    from rollout.drafters.eagle3_model import eagle3_config
    from tests.support import tiny_llama

    with pytest.raises(ValueError, match=r"drafter.draft_vocab_size is 98, the target has 97 tokens"):
        eagle3_config(tiny_llama().config, 98, (0, 1, 2))
