"""Signals that ask a run to stop after its step, and those that end it at once."""

import os
import signal
import subprocess
import sys
import time

import pytest
from typer.testing import CliRunner

from paceline.cli.main import app
from paceline.rl.checkpointing.graceful_stop import GracefulStop

RUN = """
import os, signal, sys, time
from pathlib import Path
from paceline.rl.checkpointing.graceful_stop import GracefulStop
with GracefulStop(Path(sys.argv[1])) as interruption:
    print("up", flush=True)
    while not interruption.asked:
        time.sleep(0.01)
    print("asked", flush=True)
    time.sleep(float(sys.argv[2]))
raise SystemExit(interruption.status)
"""


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 0), (signal.SIGTERM, 143), (signal.SIGUSR1, 138)]
)
def test_the_first_signal_asks(tmp_path, number, status, capsys):
    before = signal.getsignal(number)
    (tmp_path / "stop").touch()  # of a run before
    with GracefulStop(tmp_path) as interruption:
        assert not interruption.asked
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)  # the same one, passed on by a launcher
        assert interruption.asked and interruption.status == status
    assert capsys.readouterr().out.count("stopping after this step") == 1
    assert signal.getsignal(number) == before


def test_a_second_one_ends_the_process_at_once(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", RUN, str(tmp_path), "60"], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "up\n"
    process.send_signal(signal.SIGTERM)
    said = [process.stdout.readline() for _ in range(3)]
    assert "SIGTERM again to stop now" in said[1] and said[2] == "asked\n"
    time.sleep(1.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=10) == -signal.SIGTERM
    process.communicate()


def test_a_file_asks_too(tmp_path):
    with GracefulStop(tmp_path) as interruption:
        (tmp_path / "stop").touch()
        assert interruption.asked and interruption.status == 0


_STARTING = """
import os, pathlib, signal, sys, time
stop, end = pathlib.Path(sys.argv[1], "stop"), time.monotonic() + 20
time.sleep(0.5)
os.kill(os.getppid(), signal.SIGINT)
while not stop.exists():  # asked for while this is starting
    time.sleep(0.02)
stop.unlink()  # as ranks do with an earlier run's
while not stop.exists():
    if time.monotonic() > end:
        sys.exit(9)
    time.sleep(0.02)
"""


def test_a_stop_that_is_asked_for_while_ranks_start_is_not_lost(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(
        "paceline.cli.train.rank_command",
        lambda *_: [sys.executable, "-S", "-c", _STARTING, str(tmp_path)],
    )
    found = CliRunner().invoke(app, ["train", "--resume", str(tmp_path), "--ranks", "2"])
    assert found.exit_code == 0, found.output
