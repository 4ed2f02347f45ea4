"""The drafter's training as users reach it: the warm-up command, a start from its drafter, losses side by side."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from drafter_trainer.checkpoint import load_drafter
from rl.bench import RolloutBench
from rl.bench_losses import VARIANTS, CollectionRow, compare_losses
from rl.bench_served import ServedRow
from rl.config import load_config
from tests.test_end_to_end import finish, steps_of, train

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PACELINE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def test_a_warmed_up_drafter_starts_a_run(tmp_path, cache):
    """Then the very first step drafts with it, every rank alike; a run that never trains keeps it as it is."""
    out = tmp_path / "drafter"
    command = [sys.executable, "launch/warmup_drafter.py", "configs/tiny.yaml", str(out), "--minutes", "0.05"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    report = json.loads((out / "warmup.json").read_text())
    assert report["updates"] > 0 and 1 <= report["greedy"] <= 5 and 1 <= report["sampled"] <= 5
    load_drafter(out, 99, 64)
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert again.returncode == 2 and "exists; name a new directory" in again.stderr

    run = tmp_path / "run"
    options = ("speculation.strategy=eagle3:2", "drafter.schedule=never", f"drafter.start={out}", "steps=2")
    finish(train("configs/tiny.yaml", f"out={run}", *options))
    steps = steps_of(run)
    assert "rollout/acceptance_length_eagle3" in steps[0]
    assert all("drafter/updates" not in step for step in steps)
    kept, started = load_drafter(run / "drafter", 99, 64), load_drafter(out, 99, 64)
    assert (kept.fc.weight - started.fc.weight).abs().max() <= started.fc.weight.abs().max() * 2**-8  # exported in bfloat16


def test_a_start_that_does_not_fit_is_one_line(tmp_path, cache):
    output, _ = (process := train("configs/tiny.yaml", f"out={tmp_path / 'r'}", f"drafter.start={tmp_path}")).communicate(
        timeout=120
    )
    assert process.returncode != 0
    assert "drafter.start" in output and "config.json: missing" in output


def test_losses_side_by_side(cache):
    bench = RolloutBench(load_config(ROOT / "configs/tiny.yaml"), None, 1, 64)
    lines: list[str] = []
    rows = compare_losses(bench, seconds=0.1, sequences=16, say=lines.append)
    assert [row.variant for row in rows] == list(VARIANTS) and len(lines) == len(rows)
    assert all(row.updates > 0 and 1 <= row.drawn <= 5 and 1 <= row.likeliest <= 5 for row in rows)


def test_ratios():
    assert ServedRow(64, 4, engine=2.0, vllm=1.9).ratio == pytest.approx(0.95)
    assert CollectionRow(without=9.8, collecting=10.0).share == pytest.approx(0.02)
