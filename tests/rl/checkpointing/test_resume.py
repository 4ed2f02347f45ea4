"""What a run goes on from, with which recipe, and what it says of what it found."""

import json
import shutil
from functools import partial

import pytest
import torch

from paceline.drafter_trainer.storage.checksums import write_checksums
from paceline.rl.checkpointing.checkpoint import save_checkpoint
from paceline.rl.checkpointing.parts import write_policy
from paceline.rl.checkpointing.resume import changes, keep_recipe, resumed_recipe
from paceline.rl.checkpointing.run_directory import open_run
from paceline.rl.config.run import to_dict
from paceline.rl.errors import UserError
from paceline.rl.models.loading import load_policy
from paceline.rl.models.policies import fetch_policy
from paceline.rl.process.files import append_line
from paceline.rl.recipe import load_config
from paceline.rl.run import find_run, parse_arguments
from paceline.rl.sharding import FullState
from tests.support import ROOT, train_here

PLAIN = (
    "speculation.strategy=plain",
    "speculation.drafters=[]",
    "update.kl_coef=0",
    "measure.plain_every=0",
    "task.size=4",
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """What a tiny run of two steps leaves, with two checkpoints."""
    folder = tmp_path_factory.mktemp("made")
    run = folder / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PACELINE_CACHE", str(folder / "cache"))
        source = fetch_policy("tiny-llama")
        policy = load_policy(source)
        config = load_config(ROOT / "configs" / "tiny.yaml", [f"out={run}", "steps=2", *PLAIN])
        run.mkdir()
        keep_recipe(config, run)
        (run / "summary.json").write_text("{}")
        for step in (0, 1):
            for name in ("metrics.jsonl", "timeline.jsonl"):
                append_line(run / name, {"step": step})
            optimizer = torch.optim.AdamW(policy.parameters()).state_dict()
            state = FullState(dict(policy.named_parameters()), optimizer)
            writer = partial(write_policy, policy=policy, tokenizer_from=source, state=state)
            save_checkpoint(run, step + 1, [writer], recipe=to_dict(config))
    return folder


@pytest.fixture
def run(made, tmp_path, monkeypatch):
    monkeypatch.setenv("PACELINE_CACHE", str(made / "cache"))
    shutil.copytree(made / "run", tmp_path / "run")
    return tmp_path / "run"


def refused(monkeypatch, capsys, *arguments):
    """The one line with which a command was refused."""
    with pytest.raises(SystemExit) as left:
        train_here(monkeypatch, *map(str, arguments))
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert left.value.code == 2
    return said


def steps_of(run):
    return [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.ci
def test_a_run_goes_on_with_other_values_which_are_recorded(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PACELINE_CACHE", str(tmp_path / "cache"))
    run = tmp_path / "run"
    train_here(monkeypatch, str(ROOT / "configs" / "tiny.yaml"), f"out={run}", "steps=2", *PLAIN)
    train_here(monkeypatch, "--resume", str(run), "steps=3", "save_every=7")
    assert steps_of(run) == [0, 1, 2]
    assert json.loads((run / "config.json").read_text())["save_every"] == 7
    resumed = [json.loads(line) for line in (run / "resumes.jsonl").read_text().splitlines()]
    assert [(r["step"], r["ranks"], r["changed"]) for r in resumed] == [(2, 1, ["steps=3", "save_every=7"])]
    assert "steps 2 → 3" in capsys.readouterr().out
    for name, steps in (("checkpoint", 3), ("checkpoint.old", 2)):
        assert json.loads((run / name / "state.json").read_text())["steps_done"] == steps
    for name in ("checkpoint", "checkpoint.old"):
        shutil.rmtree(run / name)
    (run / "summary.json").unlink()
    # where nothing whole is
    train_here(monkeypatch, str(ROOT / "configs" / "tiny.yaml"), f"out={run}", "steps=1", *PLAIN)
    assert steps_of(run) == [0] and (run / "checkpoint").is_dir()


@pytest.mark.parametrize(
    "override",
    [
        "seed=3",
        "policy.model=small-llama",
        "rollout.group_size=2",
        "rollout.prompts_per_step=2",
        "scale.lora={}",
        "task.system=x",
    ],
)
def test_what_would_make_the_checkpoint_meaningless_is_refused(run, monkeypatch, capsys, override):
    before = (run / "config.json").read_bytes()
    said = refused(monkeypatch, capsys, "--resume", run, override)
    assert f": {override.partition('=')[0]}" in said and "start a new run" in said
    config = json.loads(before)
    *parents, last = override.partition("=")[0].split(".")
    section = config
    for parent in parents:
        section = section[parent]
    section[last] = (
        {"rank": 4, "alpha": 8, "targets": []}
        if last == "lora"
        else "small-llama"
        if last == "model"
        else "y"
        if last == "system"
        else 2
    )
    (run / "config.json").write_text(json.dumps(config))  # the same by hand
    said = refused(monkeypatch, capsys, "--resume", run)
    assert "recipe.json" in said and override.partition("=")[0] in said


def test_mistakes_of_an_override_are_one_line(run, monkeypatch, capsys):
    for override, says in (
        ("stepz=3", "did you mean steps"),
        ("steps=1", "has done 2 steps already"),
        ("steps=x", "steps is 'x'"),
    ):
        assert says in refused(monkeypatch, capsys, "--resume", run, override)
    assert json.loads((run / "config.json").read_text())["steps"] == 2


def opened(run, capsys):
    """Where a run goes on from, and what is said of it."""
    capsys.readouterr()
    found = open_run(resumed_recipe(run, [], print), run, ranks=1, resume=True, overrides=[])
    return found, capsys.readouterr().out


def test_the_older_checkpoint_is_used_where_the_newest_is_broken(run, capsys):
    """The broken one is put aside, so that the next save does not remove the whole one in its favour."""
    weights = next((run / "checkpoint" / "policy").glob("*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 4
    weights.write_bytes(data)
    found, said = opened(run, capsys)
    assert (
        "its content has changed since it was written; going on from the older" in said
        and "after step 1" in said
    )
    assert (found.path, found.steps_done) == (run / "checkpoint.old", 1)
    assert steps_of(run) == [0]
    assert (run / "checkpoint.broken").is_dir() and not (run / "checkpoint").exists()


@pytest.mark.parametrize(
    "part", ["selector.json", "drafter/model.safetensors", "drafter_optimizer.json", "lengths.safetensors"]
)
def test_what_a_run_can_do_without_is_left_out(run, capsys, part):
    for name in ("drafter", "drafter_optimizer.json", "selector.json", "lengths.safetensors"):
        path = (
            run / "checkpoint" / name / "model.safetensors"
            if name == "drafter"
            else run / "checkpoint" / name
        )
        path.parent.mkdir(exist_ok=True)
        path.write_text("{}")
    write_checksums(run / "checkpoint")
    (run / "checkpoint" / part).write_text("{ }")
    found, said = opened(run, capsys)
    assert found.path.name == "checkpoint" and found.broken == {
        part.partition("/")[0].removesuffix(".json") if "drafter" in part else part
    }
    assert f"{part}: it has 3 bytes, 2 were written; going on without" in said


def test_where_no_checkpoint_is_whole_both_are_named(run, monkeypatch, capsys):
    for name in ("checkpoint", "checkpoint.old"):
        (run / name / "optimizer.safetensors").write_bytes(b"")
    said = refused(monkeypatch, capsys, "--resume", run)
    assert (
        "checkpoint/optimizer.safetensors: it has 0 bytes" in said and "no older checkpoint is whole" in said
    )


def test_a_run_without_a_checkpoint_starts_from_its_beginning(run, capsys):
    """Resumed, or started again where it was."""
    for name in ("checkpoint", "checkpoint.old"):
        shutil.rmtree(run / name)
    (run / "summary.json").unlink()
    (run / "drafters" / "step-9").mkdir(parents=True)
    found, said = opened(run, capsys)
    assert found is None and "starts from step 1" in said
    assert steps_of(run) == [] and not (run / "drafters").exists()
    args = parse_arguments(None, [str(ROOT / "configs" / "tiny.yaml"), f"out={run}"])
    assert find_run(args)[1] == run  # and may be started again
    (run / "checkpoint").mkdir()
    with pytest.raises(UserError, match="holds a run"):
        find_run(args)


def test_a_broken_recipe_is_read_from_the_checkpoint(run):
    said = []
    (run / "config.json").write_text('{"steps": ')
    assert resumed_recipe(run, [], said.append).steps == 2
    assert len(said) == 1 and "config.json: truncated" in said[0]
    shutil.rmtree(run / "checkpoint")
    shutil.rmtree(run / "checkpoint.old")
    with pytest.raises(
        UserError, match=r"config.json: truncated or not JSON .*write the run's recipe there again"
    ):
        resumed_recipe(run, [], said.append)


def test_a_checkpoint_of_an_older_release_resumes_and_that_is_said_once(run, capsys):
    for name in ("checksums.json", "recipe.json"):
        (run / "checkpoint" / name).unlink()
    state = json.loads((run / "checkpoint" / "state.json").read_text())
    del state["logs"]
    (run / "checkpoint" / "state.json").write_text(json.dumps(state))
    found, said = opened(run, capsys)
    assert said.count("no checksums to compare") == 1 and len(said.splitlines()) == 1
    assert found.steps_done == 2


def test_changed_and_broken_logs_are_said(run, capsys):
    text = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text('{"step": "x"}\n' + text[0] + '{"ste')
    _, said = opened(run, capsys)
    assert "metrics.jsonl has changed since the checkpoint" in said and "1 broken lines were left out" in said
    assert steps_of(run) == [0]


@pytest.mark.parametrize(
    "state",
    [
        "",
        "[]",
        "{}",
        '{"steps_done": "2"}',
        '{"steps_done": -1}',
        '{"steps_done": 2, "kl_coef": NaN}',
        '{"steps_done": 2, "open": {}}',
    ],
)
def test_a_state_that_is_none_is_one_line(run, capsys, state):
    """Also without checksums, which would have found it."""
    for name in ("checkpoint", "checkpoint.old"):
        (run / name / "checksums.json").unlink()
        (run / name / "state.json").write_text(state)
    with pytest.raises(UserError, match=r"checkpoint/state\.json: ") as refused:
        opened(run, capsys)
    assert "\n" not in str(refused.value)


def test_another_number_of_ranks_that_does_not_fit_is_one_line(run, monkeypatch, capsys):
    monkeypatch.setattr("paceline.rl.trainer.Accelerator.num_processes", 3, raising=False)
    assert "not a multiple of the 3 ranks" in refused(monkeypatch, capsys, "--resume", run, "steps=3")


def test_a_full_disk_at_resume_is_one_line_and_keeps_what_there_is(run, monkeypatch, capsys):
    def full(*arguments):
        raise OSError(28, "No space left on device", str(run / "metrics.jsonl"))

    kept = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != "lock"}
    monkeypatch.setattr("paceline.rl.checkpointing.run_directory.keep_first_lines", full)
    said = refused(monkeypatch, capsys, "--resume", run)
    assert "metrics.jsonl: No space left on device; free disk space" in said
    assert all(path.read_bytes() == data for path, data in kept.items())


def test_a_run_in_the_way_is_one_line(run, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    assert "a file is in the way" in refused(
        monkeypatch, capsys, ROOT / "configs" / "tiny.yaml", f"out={tmp_path / 'file'}"
    )


def test_differences_have_dotted_names():
    config = to_dict(load_config(ROOT / "configs" / "tiny.yaml"))
    other = to_dict(load_config(ROOT / "configs" / "tiny.yaml", ["update.lr=0.5", "scale.lora={}"]))
    assert changes(config, config) == {}
    found = changes(config, other)
    assert found["update.lr"] == (1e-3, 0.5) and set(found) == {"update.lr", "scale.lora"}


def test_a_value_that_contradicts_the_recipe_names_the_file(run):
    kept = run / "config.json"
    config = json.loads(kept.read_text())
    config["rollout"]["kv_memory_gb"] = float("inf")
    kept.write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"config\.json: rollout\.kv_memory_gb is inf"):
        resumed_recipe(run, [], print)
