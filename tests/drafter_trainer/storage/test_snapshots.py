"""Snapshots are whole or absent, few, and cost the caller a copy."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from paceline.drafter_trainer.storage.optimizer_state import OptimizerStateError, load_optimizer
from paceline.drafter_trainer.storage.snapshots import DrafterSnapshots
from tests.engines import tiny_eagle3, tiny_llama
from tests.support import ROOT


def trained():
    drafter = tiny_eagle3(tiny_llama())
    optimizer = torch.optim.AdamW(drafter.parameters(), lr=1e-3)
    for parameter in drafter.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return drafter, optimizer


def test_what_is_restored_is_what_was_saved_however_the_model_moved_on(tmp_path):
    drafter, optimizer = trained()
    snapshots = DrafterSnapshots(tmp_path / "drafters", keep=2)
    for step in range(4):
        with torch.no_grad():
            drafter.fc.weight.fill_(float(step))
        assert snapshots.save(step, drafter, optimizer) is None
        with torch.no_grad():
            drafter.fc.weight.fill_(99.0)  # while it is being written
    assert snapshots.wait() is None
    assert sorted(p.name for p in (tmp_path / "drafters").iterdir()) == ["step-2", "step-3"]
    (step, path, again), problems = snapshots.newest(97, 64)
    assert step == 3 and not problems and bool((again.fc.weight == 3).all())
    fresh = torch.optim.AdamW(again.parameters(), lr=1e-3)
    load_optimizer(fresh, path / "optimizer")
    torch.testing.assert_close(
        fresh.state[again.fc.weight]["exp_avg"], optimizer.state[drafter.fc.weight]["exp_avg"]
    )


def test_a_truncated_one_is_named_and_the_one_before_is_used(tmp_path):
    drafter, optimizer = trained()
    snapshots = DrafterSnapshots(tmp_path, keep=3)
    for step in (1, 2):
        snapshots.save(step, drafter, optimizer)
    snapshots.wait()
    weights = tmp_path / "step-2" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    (step, _, _), problems = snapshots.newest(97, 64)
    assert step == 1
    assert len(problems) == 1 and "step-2" in problems[0] and "truncated" in problems[0]
    (tmp_path / "step-1" / "optimizer.safetensors").write_bytes(b"")
    with pytest.raises(OptimizerStateError, match="truncated"):
        load_optimizer(optimizer, tmp_path / "step-1" / "optimizer")


def test_a_failed_write_is_told_and_costs_nothing_else(tmp_path):
    drafter, optimizer = trained()
    (tmp_path / "drafters").write_text("a file where the directory should be")
    snapshots = DrafterSnapshots(tmp_path / "drafters")
    assert snapshots.save(1, drafter, optimizer) is None
    assert "could not be written" in snapshots.save(2, drafter, optimizer)
    assert "could not be written" in snapshots.wait()
    assert snapshots.wait() is None


def test_a_removal_that_is_cut_short_leaves_no_half_snapshot(tmp_path, monkeypatch):
    """As when the process is killed: only the first file of each directory is gone."""

    def cut_short(path, ignore_errors):
        for file in sorted(Path(path).glob("*"))[:1]:
            file.unlink()

    drafter, optimizer = trained()
    snapshots = DrafterSnapshots(tmp_path, keep=1)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", cut_short)
        for step in (1, 2, 2):
            assert snapshots.save(step, drafter, optimizer) is None
        assert snapshots.wait() is None
    assert [path.name for path in sorted(tmp_path.glob("step-*"))] == ["step-2"]
    found, problems = DrafterSnapshots(tmp_path).newest(97, 64)
    assert found[0] == 2 and not problems
    assert snapshots.save(3, drafter, optimizer) is None and snapshots.wait() is None
    assert [path.name for path in tmp_path.iterdir()] == ["step-3"]


# For each folder named on its input, forks a process that prints its number and writes snapshots without end.
WRITERS = """
import os, sys
from pathlib import Path
import torch
from paceline.drafter_trainer.storage.snapshots import DrafterSnapshots
from tests.drafter_trainer.storage.test_snapshots import trained
torch.set_num_threads(1)
drafter, optimizer = trained()
for folder in sys.stdin:
    if os.fork():
        print("killed", os.wait(), flush=True)
        continue
    snapshots = DrafterSnapshots(Path(folder.strip()), keep=2)
    print(os.getpid(), flush=True)
    for step in range(10**6):
        with torch.no_grad():
            for parameter in drafter.parameters():
                parameter.fill_(float(step))
        snapshots.save(step, drafter, optimizer)
"""


@pytest.mark.ci
def test_killed_at_any_point_what_loads_is_right(tmp_path):
    """kill -9 while snapshots are written as fast as they can be: each that loads is of one step only."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    pause, loaded = random.Random(0), 0
    with subprocess.Popen(
        [sys.executable, "-c", WRITERS],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as writers:
        for attempt in range(20):
            folder = tmp_path / str(attempt % 4)
            writers.stdin.write(f"{folder}\n")
            writers.stdin.flush()
            writer = int(writers.stdout.readline())
            time.sleep(pause.uniform(0.02, 0.25))
            os.kill(writer, signal.SIGKILL)
            assert "killed" in writers.stdout.readline()
            found, problems = DrafterSnapshots(folder).newest(97, 64)
            assert not problems
            if found is not None:
                values = {float(x) for p in found[2].parameters() for x in p.detach().aminmax()}
                assert values == {float(found[0])}
                loaded += 1
        writers.stdin.close()
    assert loaded > 10
