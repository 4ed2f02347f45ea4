"""One writer a run: the lock is refused to a second one, and free again however its holder ended."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from paceline.rl.checkpointing import run_lock
from paceline.rl.checkpointing.run_lock import RunLock
from paceline.rl.errors import UserError

HOLDER = """
import sys, time
from pathlib import Path
from paceline.rl.checkpointing.run_lock import RunLock
with RunLock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_second_writer_is_refused_in_a_line_and_a_killed_one_leaves_the_lock_free(tmp_path, holder):
    run = tmp_path / "run"
    with pytest.raises(UserError) as refused, RunLock(run):
        pass
    said = str(refused.value)
    assert (
        f"process {holder.pid} on " in said
        and "since 2" in said
        and "last sign of life" in said
        and "\n" not in said
    )
    holder.kill()
    holder.wait()
    begin = time.monotonic()
    with RunLock(run):
        owner = json.loads((run / "lock").read_text())
        assert owner["pid"] == os.getpid()
    assert time.monotonic() - begin < 1
    assert (run / "lock").read_text() == ""  # let go


def test_only_the_active_process_takes_it(tmp_path, holder):
    with RunLock(tmp_path / "run", active=False):
        pass


def left_by_another_machine(run, count):
    run.mkdir(exist_ok=True)
    owner = {
        "host": "node7",
        "boot": "another",
        "pid": 1,
        "born": "1",
        "since": "2026-01-01T00:00:00+00:00",
        "count": count,
    }
    (run / "lock").write_text(json.dumps(owner))


def test_another_machine_that_died_is_waited_for_and_one_that_lives_is_refused(tmp_path, monkeypatch):
    """A network file system may keep the kernel's lock to one machine: then the owner's count decides."""
    run = tmp_path / "run"
    left_by_another_machine(run, 3)
    with RunLock(run, patience=0.2):
        pass
    counts = iter(range(3, 99))
    left_by_another_machine(run, next(counts))
    monkeypatch.setattr(run_lock.time, "sleep", lambda seconds: left_by_another_machine(run, next(counts)))
    with pytest.raises(UserError, match="process 1 on node7"), RunLock(run, patience=5):
        pass


def test_without_the_kernels_locks_the_owner_decides(tmp_path, monkeypatch, holder):
    def none(*arguments):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(run_lock.fcntl, "flock", none)
    with pytest.raises(UserError, match=f"process {holder.pid}"), RunLock(tmp_path / "run"):
        pass
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with RunLock(tmp_path / "run"):
        pass


def test_a_directory_that_cannot_be_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match="a file is in the way"), RunLock(out):
            pass

    def read_only(*arguments):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(run_lock.os, "open", read_only)
    with (
        pytest.raises(UserError, match=r"cannot be written \(Read-only file system\)"),
        RunLock(tmp_path / "run"),
    ):
        pass
