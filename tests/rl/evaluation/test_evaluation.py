"""Evaluations on problems that are not trained on, within a run and after it, and the checkpoints that a run
keeps.
"""

import contextlib
import json
import shutil
from types import SimpleNamespace

import datasets
import pytest
from typer.testing import CliRunner

from paceline.cli.main import app
from paceline.rl.checkpointing.kept_checkpoints import find_kept, keep_checkpoint
from paceline.rl.errors import UserError
from paceline.rl.evaluation.during_training import EvaluationFailed
from paceline.rl.evaluation.problems import check_not_trained, evaluation_problems, fitting
from paceline.rl.recipe import load_config
from paceline.rl.tasks.task import load_task
from paceline.rl.trainer import Trainer
from tests.support import ROOT, train_here

TINY = ROOT / "configs" / "tiny.yaml"
PLAIN = ("speculation.strategy=plain", "speculation.drafters=[]", "update.kl_coef=0", "measure.plain_every=0")


def write_rows(path, count, start=0):
    rows = [{"prompt": f"{i} + 1 =", "answer": str(i + 1)} for i in range(start, start + count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def of_rows(path, *more):
    return load_config(TINY, ["task.source=jsonl", f"task.path={path}", "task.datasets=[]", *more])


def test_held_out_problems_are_none_of_those_trained_on(tmp_path):
    config = of_rows(write_rows(tmp_path / "rows.jsonl", 200), "task.heldout=0.2")
    asked = evaluation_problems(config, 1000).problems
    trained = {p.question for p in load_task(config.task, config.seed).problems}
    assert 20 <= len(asked) <= 60
    assert {p.question for p in asked}.isdisjoint(trained)
    assert len(trained) + len(asked) == 200
    assert [p.key for p in evaluation_problems(config, 5).problems] == [p.key for p in asked[:5]]


def test_prompts_without_room_are_left_out_and_counted(tmp_path):
    rows = [{"prompt": "1 + 1 =", "answer": "2"}, {"prompt": "x" * 400, "answer": "2"}]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = load_config(TINY, [f"evaluation.path={tmp_path / 'own.jsonl'}"])
    asked = fitting(evaluation_problems(config, 4), lambda text: {"input_ids": list(text)}, config)
    assert [p.question for p in asked.problems] == ["1 + 1 ="]
    assert "1 more do not fit" in asked.origin


def test_a_file_without_held_out_problems_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"task\.heldout.*evaluation\.path"):
        evaluation_problems(of_rows(write_rows(tmp_path / "rows.jsonl", 12)), 4)


@pytest.mark.parametrize("more", [[], ["evaluation.split=test"]])
def test_the_file_that_is_trained_on_is_no_evaluation(tmp_path, monkeypatch, more):
    path = write_rows(tmp_path / "rows.jsonl", 12)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="which is trained on"):
        evaluation_problems(of_rows(path, "evaluation.path=rows.jsonl", *more), 4)


def test_another_split_of_the_data_set_is_asked(tmp_path):
    rows = {
        name: [{"prompt": f"{i} + 1 =", "answer": str(i + 1)} for i in range(k, k + 9)]
        for name, k in (("train", 0), ("test", 50))
    }
    datasets.DatasetDict(
        {name: datasets.Dataset.from_list(part) for name, part in rows.items()}
    ).save_to_disk(tmp_path / "sums")
    task = [
        "task.source=huggingface",
        f"task.path={tmp_path / 'sums'}",
        "task.datasets=[]",
        f"evaluation.path={tmp_path / 'sums'}",
    ]
    asked = evaluation_problems(load_config(TINY, [*task, "evaluation.split=test"]), 4)
    assert len(asked.problems) == 4 and all(int(p.answer) > 50 for p in asked.problems)
    with pytest.raises(UserError, match=r"evaluation\.split"):
        evaluation_problems(load_config(TINY, task), 4)


def test_a_step_is_saved_before_an_evaluation_that_nothing_scores_ends_the_run(tmp_path):
    trainer, done = object.__new__(Trainer), []
    trainer.config, trainer.run_dir = load_config(TINY, ["eval_every=3"]), tmp_path
    trainer.tracker = SimpleNamespace(
        phase=lambda *_: contextlib.nullcontext(), log=lambda step, *_: done.append(("log", step))
    )
    trainer._save = lambda steps: done.append(("save", steps))
    trainer.evaluation = SimpleNamespace(
        run=lambda steps: (_ for _ in ()).throw(EvaluationFailed(f"evaluation after step {steps}"))
    )
    with pytest.raises(UserError, match=r"after step 3; .*checkpoint"):
        trainer._evaluate(2, {}, [], False)
    assert done == [("log", 2), ("save", 3)]


def test_problems_of_their_own_file(tmp_path):
    own = write_rows(tmp_path / "own.jsonl", 6, start=500)
    config = of_rows(
        write_rows(tmp_path / "rows.jsonl", 12), f"evaluation.path={own}", "task.instruction=Be brief."
    )
    asked = evaluation_problems(config, 4)
    assert len(asked.problems) == 4
    assert all("Be brief." in p.question and int(p.answer) > 500 for p in asked.problems)
    assert all(
        load_task(asked.task, asked.seed, check=False).find(p.key).answer == p.answer for p in asked.problems
    )


def test_reasoning_gyms_problems_are_others():
    """Of so few different sums that many are drawn twice."""
    config = load_config(TINY, ["task.size=60"])
    asked = evaluation_problems(config, 40)
    trained = {p.question for p in load_task(config.task, config.seed).problems}
    assert len(asked.problems) == 40
    assert {p.question for p in asked.problems}.isdisjoint(trained)


@pytest.mark.parametrize(
    ("override", "says"),
    [("task.heldout=0.5", "task.heldout"), ("seed=3", "seed"), ("task.path=PATH", "task.path")],
)
def test_what_a_run_was_trained_on_is_not_what_it_held_out(tmp_path, override, says):
    path = write_rows(tmp_path / "rows.jsonl", 50)
    other = write_rows(tmp_path / "other.jsonl", 50)
    trained = of_rows(path, "task.heldout=0.2")
    check_not_trained(of_rows(path, "task.heldout=0.2", "rollout.max_tokens=7"), trained)
    with pytest.raises(UserError, match=says):
        check_not_trained(of_rows(path, "task.heldout=0.2", override.replace("PATH", str(other))), trained)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["keep_best=true"], "eval_every"),
        (["keep_last=0"], "keep_last is 0"),
        (["eval_every=-1"], "eval_every is -1"),
        (["evaluation.temperature=-1"], r"evaluation\.temperature"),
        (["evaluation.samples=0"], r"evaluation\.samples"),
    ],
)
def test_rules_of_evaluations(overrides, says):
    with pytest.raises(UserError, match=says):
        load_config(TINY, overrides)


def checkpoint(run, text):
    """What a save leaves: a new directory with new files."""
    (run / "checkpoint" / "policy").mkdir(parents=True)
    (run / "checkpoint" / "policy" / "model.safetensors").write_text(text)


def test_the_last_and_the_best_checkpoints_are_kept(tmp_path):
    for step, best in ((1, True), (2, False), (3, True), (4, False)):
        if (tmp_path / "checkpoint").exists():
            (tmp_path / "checkpoint").rename(tmp_path / f"before-{step}")
        checkpoint(tmp_path, f"step {step}")
        keep_checkpoint(tmp_path, step, last=2, best=best)
    kept = {p.name: (p / "policy" / "model.safetensors") for p in (tmp_path / "checkpoints").iterdir()}
    assert {name: path.read_text() for name, path in kept.items()} == {
        "step-3": "step 3",
        "step-4": "step 4",
        "best": "step 3",
    }
    last = tmp_path / "checkpoint" / "policy" / "model.safetensors"
    assert kept["step-4"].stat().st_ino == last.stat().st_ino  # takes no room
    assert find_kept(tmp_path, "best") == tmp_path / "checkpoints" / "best"
    assert find_kept(tmp_path, None) == tmp_path / "checkpoint"
    with pytest.raises(UserError, match="write one of best, step-3, step-4"):
        find_kept(tmp_path, "step-1")


def test_checkpoints_that_a_run_has_given_up_go_first(tmp_path):
    checkpoint(tmp_path, "any")
    for step in (8, 10, 9):  # it goes on from 8: 10 is another future
        keep_checkpoint(tmp_path, step, last=2, best=False)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-8", "step-9"]


def test_a_kept_checkpoint_that_goes_while_the_run_is_killed_is_whole_or_gone(tmp_path, monkeypatch):
    checkpoint(tmp_path, "any")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda path, ignore_errors: None)  # it did not get that far
        for step in (1, 2, 3):
            keep_checkpoint(tmp_path, step, last=2, best=False)
    assert sorted(p.name for p in (tmp_path / "checkpoints").glob("step-*")) == ["step-2", "step-3"]
    keep_checkpoint(tmp_path, 4, last=2, best=False)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-3", "step-4"]


@pytest.mark.ci
def test_a_run_evaluates_keeps_its_best_and_is_evaluated_alike(tmp_path, monkeypatch):
    monkeypatch.setenv("PACELINE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("paceline.rl.monitoring.report.write_report", lambda run: run / "report.html")
    (tmp_path / "digits.py").write_text(
        "def share(prompts, completions, answer, **columns):\n"
        "    assert all(int(a) < 100 for a in answer)\n"
        "    return [sum(c.isdigit() for c in t) / max(len(t), 1) for t in completions]\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    path, run = write_rows(tmp_path / "rows.jsonl", 40), tmp_path / "run"
    task = [
        "task.source=jsonl",
        f"task.path={path}",
        "task.datasets=[]",
        "task.heldout=0.3",
        "task.reward=digits:share",
    ]
    evaluated = [
        "eval_every=2",
        "keep_best=true",
        "keep_last=2",
        "evaluation.prompts=6",
        "evaluation.samples=2",
    ]
    train_here(
        monkeypatch,
        str(TINY),
        f"out={run}",
        "steps=5",
        "update.lr=3e-3",
        "save_every=2",
        *task,
        *evaluated,
        *PLAIN,
    )
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rewards = {m["step"] + 1: m["eval/reward"] for m in metrics if "eval/reward" in m}
    assert list(rewards) == [2, 4, 5]
    best = max(rewards, key=rewards.get)
    assert json.loads((run / "checkpoints" / "best" / "state.json").read_text())["steps_done"] == best
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["best", "step-4", "step-5"]
    # the command asks the same problems in the same way
    out = tmp_path / "evaluation.json"
    found = CliRunner().invoke(
        app,
        [
            "evaluate",
            "--run",
            str(run),
            "--checkpoint",
            "best",
            "--prompts",
            "6",
            "--samples",
            "2",
            "--out",
            str(out),
        ],
    )
    assert found.exit_code == 0, found.output
    assert "6 problems, held out" in found.output and "digits:share" in found.output
    row = json.loads(out.read_text())[0]
    assert row["completions"] == 12
    assert 0 < row["median"] <= row["longest"] and 0 <= row["loops"] <= 12
    assert f"median {row['median']:.0f}, at most {row['longest']}" in found.output
    assert row["accuracy"] == pytest.approx(rewards[best], abs=0.15)
    refused = CliRunner().invoke(app, ["evaluate", "task.heldout=0.5", "--run", str(run)])
    assert refused.exit_code == 2
    assert "the run was trained with 0.3" in refused.stderr
