"""What a run starts from is made once, by whoever comes first."""

import json
import os
import subprocess
import sys
import threading
import time

import pytest

from paceline.rl import preparation
from paceline.rl.errors import UserError
from paceline.rl.models.initial import starting_policy, warmed_policy_path
from paceline.rl.preparation import first_drafter_path, prepare, wants_first_drafter
from paceline.rl.process.made_once import build_once, file_lock
from paceline.rl.process.progress import Display
from paceline.rl.recipe import load_config
from tests.support import ROOT

TINY = ROOT / "configs" / "tiny.yaml"
HOLD = """
import sys, time, pathlib
from paceline.rl.process.made_once import file_lock
with file_lock(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""
STARTS = ["policy.warmup={examples: 4, batch_size: 2}", "drafter.warmup_minutes=0.02"]


def test_one_makes_and_the_others_wait(tmp_path):
    made, final = [], tmp_path / "folder" / "thing"

    def make():
        made.append(threading.get_ident())
        time.sleep(0.1)
        final.mkdir()

    threads = [threading.Thread(target=build_once, args=(final, make)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1 and final.is_dir()


def test_a_killed_maker_is_not_waited_for(tmp_path):
    lock = tmp_path / "thing.lock"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(lock)], stdout=subprocess.PIPE, env=environment
    ) as job:
        assert job.stdout.readline() == b"held\n"
        assert lock.read_text() == str(job.pid)
        job.kill()
    with file_lock(lock):
        assert lock.read_text() == str(os.getpid())


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="PACELINE_CACHE"):
        build_once(tmp_path / "file" / "thing", lambda: None)


def test_what_is_missing_is_made_in_order_and_only_that(tmp_path, monkeypatch):
    monkeypatch.setenv("PACELINE_CACHE", str(tmp_path))
    config = load_config(TINY, STARTS)
    asked = []

    def make(what, config):
        asked.append(what)
        {"policy": warmed_policy_path, "drafter": first_drafter_path}[what](config).mkdir(parents=True)

    monkeypatch.setattr(preparation, "_prepare_in_subprocess", make)
    with pytest.raises(UserError, match="paceline warmup"):
        starting_policy(config)
    prepared = prepare(config, Display(active=False))
    assert asked == ["policy", "drafter"]
    assert prepared.drafter.start == str(first_drafter_path(config))
    assert prepare(config, Display(active=False)) == prepared and len(asked) == 2
    assert prepare(config, Display(active=False), drafter=False).drafter.start is None


@pytest.mark.parametrize(
    ("overrides", "wanted"),
    [
        ([], True),
        (["drafter.start=there"], False),
        (["drafter.warmup_minutes=null"], False),
        (["speculation.strategy=plain"], False),
        (["speculation.drafters=[suffix]"], False),
    ],
)
def test_who_wants_a_first_drafter(overrides, wanted):
    assert wants_first_drafter(load_config(TINY, [*STARTS, *overrides])) is wanted


def test_the_first_drafter_is_of_its_policy(tmp_path, monkeypatch):
    """Another policy, task or size makes another; another place for the run does not."""
    monkeypatch.setenv("PACELINE_CACHE", str(tmp_path))
    base = first_drafter_path(load_config(TINY, STARTS))
    same = ["out=elsewhere", "steps=9", "drafter.schedule=never", "drafter.max_slowdown=0.3"]
    assert first_drafter_path(load_config(TINY, [*STARTS, *same])) == base
    others = [
        "policy.warmup.examples=6",
        "task.size=9",
        "rollout.temperature=0.7",
        "drafter.draft_vocab_size=40",
        "seed=1",
    ]
    assert (
        len({first_drafter_path(load_config(TINY, [*STARTS, other])) for other in others} | {base})
        == len(others) + 1
    )


def test_a_failed_preparation_ends_the_run(monkeypatch, tmp_path):
    monkeypatch.setenv("PACELINE_CACHE", str(tmp_path))
    config = load_config(TINY, STARTS)
    for status, raised in ((2, SystemExit), (1, UserError), (-9, UserError)):
        code = f"import os, sys; os.kill(os.getpid(), 9) if {status} < 0 else sys.exit({status})"
        monkeypatch.setattr(preparation.sys, "executable", sys.executable)
        real = subprocess.Popen
        monkeypatch.setattr(
            preparation.subprocess,
            "Popen",
            lambda command, real=real, code=code, **more: real([sys.executable, "-c", code]),
        )
        with pytest.raises(raised):
            prepare(config, Display(active=False))
        monkeypatch.setattr(preparation.subprocess, "Popen", real)


@pytest.mark.slow
def test_train_makes_its_start_itself_outside_of_the_repository(tmp_path, monkeypatch):
    """Two ranks make it once; another run finds it."""
    environment = {**os.environ, "PACELINE_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}

    def train(name):
        command = [
            sys.executable,
            "-m",
            "paceline.cli.main",
            "train",
            "tiny",
            *STARTS,
            "steps=1",
            f"out={name}",
            "--ranks",
            "2",
        ]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    first = train("one")
    for phase in ("warming up the policy", "training a first drafter on the policy's own samples"):
        assert first.count(f"{phase}: done") == 1
    start = json.loads((tmp_path / "one" / "config.json").read_text())["drafter"]["start"]
    assert start.startswith(str(tmp_path / "cache" / "drafters"))
    assert (
        json.loads((tmp_path / "cache" / "drafters" / start.rsplit("/")[-1] / "warmup.json").read_text())[
            "rounds"
        ]
        >= 1
    )
    monkeypatch.setenv("PACELINE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(preparation, "_prepare_in_subprocess", lambda *_: pytest.fail("made again"))
    assert prepare(load_config("tiny", STARTS), Display(active=False)).drafter.start == start
