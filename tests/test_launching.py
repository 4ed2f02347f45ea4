"""The examples for clusters and launchers, with stubs in the place of SLURM's commands."""

import json
import os
import signal
import stat
import subprocess
import sys
import time

import pytest
import yaml

from paceline.rl.monitoring.summary import read_metrics
from tests.support import ROOT

SBATCH = ROOT / "examples" / "slurm" / "train.sbatch"
SRUN = """#!{python}
# Runs the command once a task, as srun does, and exits with the highest status.
# Signals reach the tasks alone.
import os, signal, subprocess, sys
signal.signal(signal.SIGUSR1, signal.SIG_IGN)
words = sys.argv[1:]
while words[0].startswith("-"):
    words.pop(0)
restore = lambda: signal.signal(signal.SIGUSR1, signal.SIG_DFL)
count = int(os.environ["SLURM_NTASKS"])
named = [os.environ | {{"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)}} for i in range(count)]
tasks = [subprocess.Popen(words, env=environment, preexec_fn=restore) for environment in named]
open(os.environ["STUBS"] + "/tasks", "w").write(" ".join(str(task.pid) for task in tasks))
statuses = [task.wait() for task in tasks]
sys.exit(max(s if s >= 0 else 128 - s for s in statuses))
"""
SCONTROL = """#!/bin/sh
echo "$*" >> "$STUBS/scontrol"
[ "$1 $2" = "show hostnames" ] && printf '127.0.0.1\\nother\\n'
exit 0
"""
RANK = """#!{python}
# Notes what a rank was started with, and exits as it is told.
import json, os, sys
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
with open(os.environ["STUBS"] + "/ranks", "a") as file:
    file.write(json.dumps([sys.argv[1:], {{name: os.environ[name] for name in names}}]) + "\\n")
sys.exit(int(os.environ.get("RANK_STATUS", "0")))
"""


@pytest.fixture
def cluster(tmp_path):
    """Starts the job script in a directory of its own, with stubs before everything else on the path."""
    stubs = tmp_path / "stubs"
    stubs.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (stubs / name).write_text(text.format(python=sys.executable) if "{python}" in text else text)
    environment = os.environ | {
        "PATH": f"{stubs}{os.pathsep}{os.environ['PATH']}",
        "STUBS": str(stubs),
        "SLURM_JOB_ID": "30123",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "2",
        "PACELINE_CACHE": str(tmp_path / "cache"),
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }

    def start(*arguments, python=None, **more):
        text = (
            RANK.format(python=sys.executable)
            if python is None
            else f'#!/bin/sh\nexec {sys.executable} "$@"\n'
        )
        (stubs / "python").write_text(text)
        for file in stubs.iterdir():
            file.chmod(file.stat().st_mode | stat.S_IXUSR)
        return subprocess.Popen(
            ["bash", str(SBATCH), *arguments],
            cwd=tmp_path,
            env=environment | more,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    start.stubs = stubs
    return start


def requeued(cluster):
    path = cluster.stubs / "scontrol"
    return path.read_text().splitlines().count("requeue 30123") if path.is_file() else 0


def test_every_task_becomes_a_rank(cluster):
    job = cluster("tiny", "out=run", "update.lr=1e-5")
    assert job.wait(30) == 0, job.stdout.read()
    started = sorted(
        (json.loads(line) for line in (cluster.stubs / "ranks").read_text().splitlines()),
        key=lambda r: r[1]["RANK"],
    )
    for number, (arguments, environment) in enumerate(started):
        assert arguments == ["-m", "paceline.cli.rank", "tiny", "out=run", "update.lr=1e-5"]
        assert environment == {
            "RANK": str(number),
            "LOCAL_RANK": str(number),
            "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": "30123",
        }
    assert requeued(cluster) == 0


@pytest.mark.parametrize(("status", "times"), [(138, 1), (143, 1), (0, 0), (1, 0), (2, 0), (137, 0)])
def test_only_what_was_stopped_is_requeued(cluster, status, times):
    assert cluster("tiny", "out=run", RANK_STATUS=str(status)).wait(30) == status
    assert requeued(cluster) == times


def test_a_job_that_comes_again_resumes(cluster, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    assert cluster("tiny", "out=run", "steps=9").wait(30) == 0
    assert json.loads((cluster.stubs / "ranks").read_text().splitlines()[0])[0][2:] == ["--resume", "run"]


def test_requeues_end(cluster):
    job = cluster("tiny", "out=run", RANK_STATUS="138", SLURM_RESTART_COUNT="3", MAX_REQUEUES="3")
    assert job.wait(30) == 138
    assert requeued(cluster) == 0 and "after 3 requeues" in job.stdout.read()


def test_a_job_without_a_directory_is_told_so(cluster):
    job = cluster("tiny")
    assert job.wait(30) == 2
    assert "out=DIRECTORY" in job.stdout.read()


@pytest.mark.ci
def test_a_run_goes_on_over_two_jobs(cluster, tmp_path):
    """The signal before the time limit: a checkpoint, into the queue, and from there to the end."""
    options = [
        "save_every=100",
        "measure.plain_every=0",
        "drafter.schedule=never",
        "speculation.strategy=plain",
    ]
    job = cluster("tiny", "out=run", "steps=60", *options, python="real")
    deadline = time.monotonic() + 120
    while not (tmp_path / "run" / "metrics.jsonl").is_file():
        assert job.poll() is None and time.monotonic() < deadline, job.stdout.read()
        time.sleep(0.1)
    for task in (cluster.stubs / "tasks").read_text().split():
        os.kill(int(task), signal.SIGUSR1)
    assert job.wait(60) == 138, job.stdout.read()
    assert requeued(cluster) == 1
    done = json.loads((tmp_path / "run" / "checkpoint" / "state.json").read_text())["steps_done"]
    assert 1 <= done < 60
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    (tmp_path / "run" / "config.json").write_text(json.dumps(config | {"steps": done + 1}))
    again = cluster("tiny", "out=run", "steps=60", *options, python="real", SLURM_RESTART_COUNT="1")
    said = again.communicate(timeout=120)[0]
    assert again.returncode == 0, said
    assert [m["step"] for m in read_metrics(tmp_path / "run")] == list(range(done + 1))
    assert (tmp_path / "run" / "report.html").is_file() and requeued(cluster) == 1


@pytest.mark.slow
def test_accelerate_launches_by_the_examples_file(tmp_path):
    """Its keys are ones that accelerate knows; it says how many processes there are, and recipes all else."""
    example = yaml.safe_load((ROOT / "examples" / "accelerate.yaml").read_text())
    assert (example["num_processes"], example["distributed_type"]) == (8, "MULTI_GPU")
    here = tmp_path / "accelerate.yaml"
    here.write_text(yaml.safe_dump(example | {"num_processes": 1, "distributed_type": "NO", "use_cpu": True}))
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.accelerate_cli",
        "launch",
        "--config_file",
        str(here),
    ]
    train = [
        str(ROOT / "launch" / "train.py"),
        "tiny",
        "steps=1",
        "measure.plain_every=0",
        f"out={tmp_path / 'run'}",
    ]
    environment = os.environ | {"PACELINE_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, *train], env=environment, capture_output=True, text=True, check=False, timeout=200
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "run" / "report.html").is_file()
