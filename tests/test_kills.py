"""kill -9 of any rank at any point: the job ends instead of hanging, and goes on from what was whole."""

import json
import os
import random
import signal
import time
from pathlib import Path

import psutil
import pytest

from paceline.drafter_trainer.storage.checkpoint import load_drafter
from tests.test_end_to_end import finish, steps_of, train


def workers_of(launcher: int) -> list[int]:
    """Process ids of a launcher's ranks, in the order in which they were started."""
    return sorted(child.pid for child in psutil.Process(launcher).children())


@pytest.mark.parametrize(
    ("kills", "in_parts"),
    [pytest.param(1, "true", marks=pytest.mark.ci), pytest.param(20, "false", marks=pytest.mark.slow)],
)
def test_a_killed_rank_ends_the_job_and_the_run_resumes(tmp_path, kills, in_parts, monkeypatch):
    """Rank 0, which hosts the store, or the other; while decoding, training the drafter, updating, or writing
    a checkpoint; of a policy in parts, too.
    """
    monkeypatch.setenv("PACELINE_CACHE", str(tmp_path / "cache"))
    run, chance = tmp_path / "run", random.Random(0)
    started = False
    for _ in range(kills):
        arguments = (
            ("--resume", str(run))
            if started
            else (
                "configs/tiny.yaml",
                f"out={run}",
                "steps=100000",
                "drafter.snapshots=2",
                f"scale.fsdp2={in_parts}",
            )
        )
        process = train(*arguments)
        before = len(steps_of_unfinished(run)) if started else 0
        deadline = time.time() + 120
        while not (run / "metrics.jsonl").exists() or len(steps_of_unfinished(run)) < before + 2:
            assert time.time() < deadline and process.poll() is None
            time.sleep(0.02)
        started = True
        time.sleep(chance.uniform(0, 0.6))
        os.kill(chance.choice(workers_of(process.pid)), signal.SIGKILL)
        process.communicate(timeout=120)  # the launcher ends the others
        assert process.returncode != 0
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**config, "steps": len(steps_of_unfinished(run)) + 2}))
    finish(train("--resume", str(run)))
    steps = [m["step"] for m in steps_of(run)]
    assert steps == list(range(len(steps)))
    load_drafter(run / "drafter", 99, 64)


def steps_of_unfinished(run: Path) -> list[dict]:
    """Whole lines of a file that is being written."""
    made = []
    for line in (run / "metrics.jsonl").read_text().splitlines():
        try:
            made.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return made
