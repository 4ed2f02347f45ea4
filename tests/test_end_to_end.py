"""The launch scripts on two ranks: a run killed midway goes on and ends as it should have."""

import json
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from paceline.drafter_trainer.storage.checkpoint import load_drafter
from tests.support import train_here

ROOT = Path(__file__).parent.parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0"]


def train(*arguments, **options):
    command = [
        *TORCHRUN,
        "--rdzv-backend",
        "c10d",
        "--rdzv-endpoint",
        "localhost:0",
        "launch/train.py",
        *arguments,
    ]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        **options,
    )


def finish(process, seconds=200) -> str:
    output, _ = process.communicate(timeout=seconds)
    assert process.returncode == 0, output
    return output


def steps_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    os.environ["PACELINE_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    return os.environ["PACELINE_CACHE"]


@pytest.mark.ci
def test_a_killed_run_resumes(tmp_path, cache):
    run = tmp_path / "run"
    tracked = ("tracking.wandb=offline", "tracking.tensorboard=true")
    process = train("configs/tiny.yaml", f"out={run}", "steps=200", *tracked)
    deadline = time.time() + 120
    while not (run / "metrics.jsonl").exists() or len(steps_of(run)) < 4:
        assert time.time() < deadline and process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**config, "steps": 4 + (before := last_saved(run))}))
    output = finish(train("--resume", str(run)))
    assert "reward, first" in output and "drafter" in output

    steps = steps_of(run)
    assert [m["step"] for m in steps] == list(range(4 + before))
    assert {shape(m) for m in steps[before:]} == {shape(m) for m in steps[1:before]}
    assert list(run.glob("wandb/offline-run-*")) and list(run.glob("tensorboard/events*"))
    load_drafter(run / "drafter", 99, 64)
    assert (run / "report.html").stat().st_size > 50_000
    assert (run / "summary.json").is_file()


def last_saved(run: Path) -> int:
    for name in ("checkpoint", "checkpoint.old"):
        state = run / name / "state.json"
        if state.is_file():
            return int(json.loads(state.read_text())["steps_done"])
    raise AssertionError("no checkpoint was saved before the kill")


def shape(metrics: dict) -> frozenset[str]:
    """The keys of a step, but for those that depend on which drafter the measured times chose, and on what
    was measured beside.
    """
    optional = (
        "rollout/acceptance_length_",
        "rollout/draft_seconds_",
        "measure/",
        "time/measure",
        "drafter/",
    )
    return frozenset(key for key in metrics if not key.startswith(optional))


def test_same_seed_same_run_after_resume(tmp_path, cache, monkeypatch):
    """Resuming is exact: steps 3 and 4 of a run stopped after step 2 equal those of a run that was not
    stopped.
    """
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    plain = [
        "speculation.strategy=plain",
        "speculation.drafters=[]",
        "update.kl_coef=0",
    ]  # without KL uniform groups are skipped
    train_here(monkeypatch, "configs/tiny.yaml", f"out={whole}", *plain)
    train_here(monkeypatch, "configs/tiny.yaml", f"out={cut}", "steps=2", *plain)
    config = json.loads((cut / "config.json").read_text())
    (cut / "config.json").write_text(json.dumps({**config, "steps": 4}))
    train_here(monkeypatch, "--resume", str(cut))
    exact = ("reward/mean", "length/mean", "update/tokens", "update/entropy", "update/kl")
    for a, b in zip(steps_of(whole), steps_of(cut), strict=True):
        assert {k: a[k] for k in exact} == {k: b[k] for k in exact}


def test_user_errors_are_one_line(tmp_path, cache, monkeypatch, capsys):
    for arguments, says in [
        (["configs/tiny.yaml", "rollout.group_sise=3"], "did you mean rollout.group_size"),
        (["configs/tiny.yaml", f"out={tmp_path / 'm'}", "rollout.kv_memory_gb=0.0001"], "the KV cache needs"),
        (
            ["configs/tiny.yaml", f"out={tmp_path / 'v'}", "drafter.draft_vocab_size=200"],
            "the target has 99 tokens",
        ),
        (["--resume", str(tmp_path / "nothing")], "no config.json"),
    ]:
        with pytest.raises(SystemExit) as left:
            train_here(monkeypatch, *arguments)
        error = capsys.readouterr().err
        assert left.value.code == 2
        assert says in error and "Traceback" not in error


def test_export_and_report_scripts_name_what_is_missing(tmp_path, monkeypatch, capsys):
    for script, arguments in (
        ("export_drafter.py", [str(tmp_path), str(tmp_path / "out")]),
        ("report.py", [str(tmp_path)]),
    ):
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        with pytest.raises(SystemExit) as left:
            runpy.run_path(str(ROOT / "launch" / script), run_name="__main__")
        error = capsys.readouterr().err
        assert left.value.code == 2
        assert str(tmp_path) in error and "Traceback" not in error
