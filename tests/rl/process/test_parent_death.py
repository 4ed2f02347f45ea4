"""Processes end with the one that started them."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

PARENT = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdout=subprocess.PIPE, text=True)
print(child.pid, child.stdout.readline().strip(), flush=True)
time.sleep(60)
"""
CHILD = """
import sys, time
from paceline.rl.process.parent_death import end_with_launcher, end_with_parent
{call}
print("up", flush=True)
time.sleep(60)
"""


def gone(pid, seconds=5.0):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.02)
    return False


@pytest.mark.parametrize(
    ("script", "call", "ends"),
    [
        ("shell.py", "end_with_parent()", True),
        ("torchrun", "end_with_launcher()", True),
        ("accelerate", "end_with_launcher()", True),
        ("shell.py", "end_with_launcher()", False),  # a shell may end before what it started: nohup
    ],
)
def test_a_child_ends_with_its_parent(tmp_path, script, call, ends):
    (tmp_path / script).write_text(PARENT)
    parent = subprocess.Popen(
        [sys.executable, str(tmp_path / script), CHILD.format(call=call)],
        stdout=subprocess.PIPE,
        text=True,
        env={k: v for k, v in os.environ.items() if k != "TORCHELASTIC_RUN_ID"},
    )
    pid, up = parent.stdout.readline().split()
    assert up == "up"
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    try:
        assert gone(int(pid), 5.0 if ends else 0.3) == ends
    finally:
        if psutil.pid_exists(int(pid)):
            os.kill(int(pid), signal.SIGKILL)


def test_a_parent_that_is_dead_already_ends_its_child_at_once():
    done = subprocess.run(
        [sys.executable, "-c", CHILD.format(call="end_with_parent(1 << 22)")], timeout=30, check=False
    )
    assert done.returncode == -signal.SIGKILL
