"""The rows of a benchmark are on disk as soon as they are measured."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from paceline.benchmarks.common import runs
from paceline.benchmarks.common.results import Results, check_target
from paceline.benchmarks.main import main
from paceline.benchmarks.training import sharding
from paceline.rl.errors import UserError
from tests.support import ROOT


@dataclass
class Row:
    name: str
    value: float


def read(path):
    return json.loads(path.read_text())


def test_each_row_is_there_at_once_and_an_earlier_result_until_the_end(tmp_path):
    path = tmp_path / "new" / "folder" / "speed.json"
    check_target(path.with_suffix(""))
    path.write_text('{"command": "earlier", "rows": [1, 2, 3]}')
    with Results(path.with_suffix(""), "paceline bench speed") as results:
        for number in range(3):
            results.into("rows")(Row(f"row {number}", number / 2))
            assert [row["value"] for row in read(path)["rows"]] == [0.5 * i for i in range(number + 1)]
            assert read(path)["unfinished"] is True
            assert read(path.with_name("speed.before.json"))["command"] == "earlier"
        results.note(total=1.5)
    assert "unfinished" not in read(path)
    assert (
        read(path)["total"] == 1.5
        and read(path)["command"] == "paceline bench speed"
        and "torch" in read(path)["machine"]
    )
    assert [p.name for p in path.parent.iterdir()] == ["speed.json"]


def test_what_fails_keeps_its_rows(tmp_path):
    with pytest.raises(ZeroDivisionError), Results(tmp_path / "out.json", "command") as results:
        results.add("rows", Row("first", 1.0))
        raise ZeroDivisionError
    assert read(tmp_path / "out.json")["rows"] == [{"name": "first", "value": 1.0}]
    assert read(tmp_path / "out.json")["unfinished"] is True


KILLED = """
import os, signal, sys
from dataclasses import dataclass
from pathlib import Path
from paceline.benchmarks.common.results import Results

@dataclass
class Row:
    value: int

with Results(Path(sys.argv[1]), "command", machine={}) as results:
    for number in range(5):
        if number == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        results.add("rows", Row(number))
"""


def test_a_killed_benchmark_keeps_its_rows(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "out")], env=environment, check=False)
    assert done.returncode == -9
    assert [row["value"] for row in read(tmp_path / "out.json")["rows"]] == [0, 1, 2]


def test_a_target_that_cannot_be_written_is_said_before_anything_is_measured(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    (tmp_path / "taken.json").mkdir()
    monkeypatch.setattr(sharding, "run", lambda args: pytest.fail("measured"))
    for out in (tmp_path / "file" / "below", tmp_path / "taken", Path("/proc/none/out")):
        with pytest.raises(SystemExit) as exit_info:
            main(["sharding", "--config", "tiny", "--runs", str(tmp_path / "runs"), "--out", str(out)])
        message = capsys.readouterr().err
        assert exit_info.value.code == 2 and f"--out {out}" in message and len(message.splitlines()) == 1


def test_a_comparison_keeps_the_runs_before_one_that_fails(tmp_path, monkeypatch):
    """Two sharding modes are measured, the third fails: the file has two rows."""
    step = {
        "update/loss": 0.1,
        "time/update": 1.0,
        "time/step": 2.0,
        "memory/peak_gb": 1.0,
        "engine/logprob_gap_max": 0.0,
    }
    runs_that_succeed = iter([[step, step], [step, step]])

    def train(config, overrides, out, ranks, log):
        metrics = next(runs_that_succeed, None)
        if metrics is None:
            raise UserError("the run failed")
        return metrics

    monkeypatch.setattr(sharding, "train_recipe", train)
    with pytest.raises(SystemExit):
        main(
            ["sharding", "--config", "tiny", "--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]
        )
    assert [row["way"] for row in read(tmp_path / "out.json")["rows"]] == ["replicated", "ZeRO 0"]


def test_a_benchmarks_run_says_how_far_it_is(tmp_path, monkeypatch):
    """The number of steps is read from the metrics that a run in another process writes."""
    script = "import pathlib, sys, time\nout = pathlib.Path(sys.argv[-1].removeprefix('out='))\nout.mkdir()\n"
    script += (
        "for step in range(3):\n    (out / 'metrics.jsonl').open('a').write('{}\\n')\n    time.sleep(0.15)\n"
    )
    script += "print('paceline: no such thing', file=sys.stderr)\nsys.exit(2 if 'fail' in sys.argv else 0)\n"
    monkeypatch.setattr(runs, "_launcher", lambda module, ranks: [sys.executable, "-c", script])
    monkeypatch.setattr(runs, "_POLL_SECONDS", 0.02)
    monkeypatch.setattr(runs, "_LOG_EVERY_SECONDS", 0.0)
    lines = []
    runs.run_ranks("paceline.cli.rank", [], tmp_path / "run", 1, lines.append)
    assert [line for line in lines if "step 2" in line] and "run" in lines[0]
    with pytest.raises(UserError, match="failed: no such thing"):
        runs.run_ranks("paceline.cli.rank", ["fail"], tmp_path / "other", 1, lines.append)
