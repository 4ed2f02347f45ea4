"""Recipes are strict, and say what to write instead."""

import dataclasses
import re

import pytest

from paceline.rl.config.parsing import parse
from paceline.rl.config.run import RunConfig, to_dict
from paceline.rl.dry_run.description import describe
from paceline.rl.errors import UserError
from paceline.rl.recipe import load_config
from paceline.rl.tasks.task import load_task
from tests.engines import tiny_llama
from tests.support import ROOT, train_here

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
        ("rollout.max_tokens=500", "which must exceed rollout.max_tokens"),
        ("rollout.top_p=2.0", "rollout.top_p"),
        ("speculation.drafters=[sufix]", "did you mean suffix"),
        ("speculation.verifier=block", "likeliest drafts need none"),
        ("speculation.draw=replacement", "combines drafts of likeliest tokens"),
        ("speculation.strategy=eagle3", "write plain, <drafter>:<depth>"),
        ("speculation.max_nodes=64", "write 1 to 63"),
        ("speculation.drafters=[composite]", "list those too"),
        ("speculation.drafters=[draft_model]", "speculation.draft_model"),
        ("policy.mixed_precision=fp16", "write one of bf16, no"),
        ("task.datasets=[]", "task.datasets is empty"),
        ("task.source=jsonl", "task.path"),
        ("task.source=huggingface", "name its directory or id in task.path"),
        ("task.path=rows.jsonl", "task.path is not read by task.source reasoning_gym"),
        ("task.split=test", "task.split and task.subset are read with task.source huggingface only"),
        ("task.heldout=1.0", "task.heldout is 1.0: write a share"),
        ("task.columns={prompt: q, answr: a}", "did you mean task.columns.answer"),
        ("task.duplicates=some", "write one of keep, drop"),
        ("task.datasets=[{nam: chain_sum}]", "did you mean task.datasets[0].name"),
        ("policy=3", "write a section"),
        (
            "drafter.max_slowdown=-0.1",
            "drafter.max_slowdown is -0.1: write a share of at least 0, such as 0.15",
        ),
        ("drafter.max_slowdown=.nan", "drafter.max_slowdown is nan"),
        ("steps", "write key=value"),
        ("steps.deep=1", "steps is a value, not a section; write steps=VALUE"),
        ("length.rewards=[{", "the value is not valid YAML"),
    ],
)
def test_errors_name_the_key(override, says):
    with pytest.raises(UserError) as error:
        load_config(TINY, [override])
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_a_bare_no_is_one_of_the_words():
    assert load_config(TINY, ["policy.mixed_precision=no"]).policy.mixed_precision == "no"


def test_overrides_and_yaml_floats(tmp_path):
    config = load_config(
        TINY, ["update.lr=2e-6", "rollout.stop_strings=['x']", "policy.warmup={examples: 3}"]
    )
    assert config.update.lr == 2e-6
    assert config.rollout.stop_strings == ("x",)
    assert config.policy.warmup.examples == 3


def test_a_kept_config_reads_back():
    config = load_config("configs/quickstart.yaml")
    assert parse(RunConfig, to_dict(config), where="kept") == config
    assert dataclasses.is_dataclass(config.policy.warmup)


@pytest.mark.parametrize(
    ("text", "says"), [("- 1", "mapping"), ("a: [", "not valid YAML"), (None, "no such recipe")]
)
def test_unreadable_recipes(tmp_path, text, says):
    path = tmp_path / "recipe.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=says):
        load_config(path)


def test_a_recipe_that_has_moved_is_proposed():
    with pytest.raises(UserError, match=r"no such recipe; did you mean length/rewards/pear\?"):
        load_config("length/pear")


def test_a_draft_vocabulary_larger_than_the_targets_is_refused():
    from paceline.rollout.drafters.eagle3_model import eagle3_config

    with pytest.raises(ValueError, match=r"drafter.draft_vocab_size is 98, the target has 97 tokens"):
        eagle3_config(tiny_llama().config, 98, (0, 1, 2))


def test_a_recipe_over_another(tmp_path):
    (tmp_path / "low.yaml").write_text(
        "steps: 7\nupdate: {lr: 1.0e-3, minibatches: 3}\ntask: {datasets: [{name: chain_sum}]}\n"
    )
    (tmp_path / "high.yaml").write_text("base: low.yaml\nupdate: {minibatches: 2}\n")
    config = load_config(tmp_path / "high.yaml", ["steps=9"])
    assert (config.steps, config.update.lr, config.update.minibatches) == (9, 1e-3, 2)
    (tmp_path / "low.yaml").write_text("base: high.yaml\n")
    with pytest.raises(UserError, match="leads back to itself"):
        load_config(tmp_path / "high.yaml")


@pytest.mark.parametrize("recipe", sorted((ROOT / "configs").glob("*.yaml"), key=str))
def test_every_recipe_is_valid_and_says_what_it_takes(recipe):
    config = load_config(recipe)
    # a data set of thousands takes half a minute to make
    few = dataclasses.replace(config.task, size=min(config.task.size, 64))
    assert load_task(few, config.seed).problems
    first, *rest = describe(config, recipe, ranks=2, gpu=80)
    assert "valid" in first
    assert "TFLOP/s" in rest[-1] and any(line.startswith("memory of each of the 2 ranks") for line in rest)
    assert not [line for line in rest if re.search(r"\b0\.0+ ", line)]


def test_a_dry_run_trains_nothing(tmp_path, monkeypatch, capsys):
    arguments = [str(TINY), f"out={tmp_path / 'run'}", "--dry-run"]
    train_here(monkeypatch, *arguments)
    said = capsys.readouterr().out
    assert "valid; 4 steps" in said and "tried: 3 steps" in said and not (tmp_path / "run").exists()
    for wrong, says in (
        ("update.kl=k1", "update.kl k1 has no gradient"),
        ("scale.deepspeed=none.json", "scale.deepspeed none.json: No such file"),
        ("scale={deepspeed: configs/deepspeed/zero3.json, fsdp2: true}", "choose one"),
    ):
        with pytest.raises(SystemExit) as left:
            train_here(monkeypatch, *arguments, wrong)
        assert left.value.code == 2 and says in capsys.readouterr().err


@pytest.mark.parametrize(
    "override",
    [
        "rollout.kv_memory_gb=.inf",
        "update.grad_clip=-3",
        "critic.value_clip=-3",
        "update.weight_decay=-3",
        "update.clip_low=.nan",
    ],
)
def test_numbers_that_mean_nothing_are_refused(override):
    key, _, value = override.partition("=")
    with pytest.raises(UserError, match=rf"{key} is {float(value.lstrip('.'))}: write a number"):
        load_config(TINY, [override])
