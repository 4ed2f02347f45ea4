"""Kills processes of a run on two ranks at random and goes on: nothing is lost, nothing stays behind, nothing
hangs.

``python -m tests.faults.kills 40 0`` prints the counts.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]
VICTIMS = ("launcher", "agent", "rank", "scorer")
_SIGNALS = (signal.SIGKILL, signal.SIGTERM)
_PATIENCE = 180.0  # seconds in which whatever was killed must be over, and whatever was started must go on
_STEPS_TO_SPARE = 50  # more than a run makes between two kills
_RECIPE = (
    "save_every=1",
    "speculation.strategy=plain",
    "speculation.drafters=[]",
    "update.kl_coef=0",
    "measure.plain_every=0",
    "rollout.max_tokens=12",
)
_SAME = ("reward/mean", "length/mean", "update/tokens", "update/entropy")


@dataclass(frozen=True, slots=True)
class Kill:
    """One kill: whom, by what, and what was wrong after it; empty where nothing was."""

    victim: str
    signal: str
    wrong: str


class Faults(Exception):
    """Something was lost, stayed behind or hung."""


def run(count: int, seed: int, say: Callable[[Kill], None] = lambda kill: None) -> dict[str, int]:
    """Kills one process ``count`` times and goes on each time; then lets the run end and compares it with one
    that nobody killed.

    Returns:
        Kills of each kind of process, and how many of them something was wrong after: ``lost``,
        ``left behind``, ``hung``.
    """
    chance, counts = random.Random(seed), Counter(dict.fromkeys((*VICTIMS, "lost", "left behind", "hung"), 0))
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        os.environ.setdefault("PACELINE_CACHE", str(folder / "cache"))
        killed = folder / "killed"
        job = _start(folder, "tiny", f"out={killed}", f"steps={_STEPS_TO_SPARE * count + 4}", *_RECIPE)
        try:
            for _ in range(count):
                job, kill = _kill_one(job, killed, chance)
                counts.update([kill.victim] + ([kill.wrong] if kill.wrong else []))
                say(kill)
            steps = len(_steps(killed)) + 2
            job.send_signal(signal.SIGTERM)
            job.wait(timeout=_PATIENCE)
            status, said = _finished(folder, _start(folder, "--resume", str(killed), f"steps={steps}"))
            whole_status, whole_said = _finished(
                folder, _start(folder, "tiny", f"out={folder / 'whole'}", f"steps={steps}", *_RECIPE)
            )
        finally:
            _slay(job)
        if status or whole_status:
            raise Faults(said + whole_said)
        kept, whole = _steps(killed), _steps(folder / "whole")
        counts["lost"] += sum(a != b for a, b in zip(kept, whole, strict=False)) + abs(len(kept) - len(whole))
    return dict(counts)


def _kill_one(
    job: subprocess.Popen[str], run_: Path, chance: random.Random
) -> tuple[subprocess.Popen[str], Kill]:
    """Kills one process of a running job at a random moment, and starts it again where that ended it."""
    before = _saved(run_)
    _wait(lambda: _saved(run_) > before or job.poll() is not None, "no step was saved")
    time.sleep(chance.uniform(0, 0.8))
    everyone = _processes(job.pid)
    if job.poll() is not None:  # it ended, and nobody had asked it to
        return _start(run_.parent, "--resume", str(run_)), Kill("scorer", "before", "lost")
    kinds = [kind for kind in VICTIMS if everyone[kind]]
    victim, number = chance.choice(kinds), chance.choice(_SIGNALS)
    saved = _saved(run_)
    chance.choice(everyone[victim]).send_signal(number)
    wrong = ""
    if victim == "scorer":  # costs a reward at most
        try:
            _wait(lambda: _saved(run_) > saved or job.poll() is not None, "the run stands still")
        except Faults:
            wrong = "hung"
        if job.poll() is None and not wrong:
            return job, Kill(victim, number.name, "")
        wrong = wrong or "lost"  # the run must not end of it
    else:
        try:
            job.wait(timeout=_PATIENCE)
        except subprocess.TimeoutExpired:
            wrong = "hung"
        left = psutil.wait_procs([p for kind in VICTIMS for p in everyone[kind]], timeout=40)[1]
        wrong = wrong or ("left behind" if left else "") or ("lost" if _saved(run_) < saved else "")
    _slay(job)
    return _start(run_.parent, "--resume", str(run_)), Kill(victim, number.name, wrong)


def _processes(launcher: int) -> dict[str, list[psutil.Process]]:
    """The processes of a job by what they are."""
    found: dict[str, list[psutil.Process]] = {kind: [] for kind in VICTIMS}
    try:
        found["launcher"] = [psutil.Process(launcher)]
        for process in found["launcher"][0].children(recursive=True):
            words = process.cmdline()
            if "paceline.cli.ranks" in words:
                found["agent"].append(process)
            elif "paceline.cli.rank" in words:
                found["rank"].append(process)
            elif "paceline.rl.rewards.worker" in words:
                found["scorer"].append(process)
    except psutil.NoSuchProcess:
        pass
    return found


def _start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """A job whose last words are in ``folder``."""
    command = [sys.executable, "-m", "paceline.cli.main", "train", *arguments, "--ranks", "2"]
    with (folder / "said").open("w") as out:
        return subprocess.Popen(
            command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )


def _finished(folder: Path, job: subprocess.Popen[str]) -> tuple[int, str]:
    return job.wait(timeout=_PATIENCE), (folder / "said").read_text(errors="replace")


def _slay(job: subprocess.Popen[str]) -> None:
    for processes in _processes(job.pid).values() if job.poll() is None else ():
        for process in processes:
            process.kill()
    job.wait()


def _saved(run_: Path) -> int:
    """Steps behind the last checkpoint."""
    for name in ("checkpoint", "checkpoint.old"):
        try:
            return int(json.loads((run_ / name / "state.json").read_text())["steps_done"])
        except (OSError, ValueError):
            continue
    return 0


def _steps(run_: Path) -> list[dict[str, float]]:
    """What must be alike in every whole step."""
    found = []
    for line in (run_ / "metrics.jsonl").read_text().splitlines():
        try:
            step = json.loads(line)
        except ValueError:
            break
        found.append({"step": step["step"], **{key: step[key] for key in _SAME}})
    return found


def _wait(over: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + _PATIENCE
    while not over():
        if time.monotonic() > end:
            raise Faults(f"{what} within {_PATIENCE:.0f} s")
        time.sleep(0.02)


if __name__ == "__main__":
    print(
        json.dumps(
            run(
                int(sys.argv[1]),
                int(sys.argv[2]),
                lambda kill: print(kill.victim, kill.signal, kill.wrong, flush=True),
            )
        )
    )
