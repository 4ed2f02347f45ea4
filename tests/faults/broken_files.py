"""Breaks files of a finished run at random and goes on from it: each must end in a line, or go on and say
what it left out.

``python -m tests.faults.broken_files 200 0`` prints the counts.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import shutil
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from paceline.rl.checkpointing.resume import resumed_recipe
from paceline.rl.checkpointing.run_directory import open_run
from paceline.rl.errors import UserError
from paceline.rl.monitoring.report import write_report
from paceline.rl.monitoring.tracker import Tracker
from paceline.rl.run import run as train
from paceline.rl.trainer import Trainer, make_accelerator

ROOT = Path(__file__).parents[2]
OUTCOMES = ("refused in a line", "went on and said so", "made no difference", "silent", "traceback")
_RECIPE = (
    "steps=3",
    "save_every=1",
    "drafter.schedule=always",
    "drafter.snapshots=2",
    "update.kl_coef=0",
    "measure.plain_every=0",
    "rollout.max_tokens=8",
)
_FULL_EVERY = 25  # of so many broken runs one goes on for a whole step
_BOTH = 0.2  # the share of faults in a checkpoint that meet the older one, too
_NOT_READ = ("lock", "stop", "report.html", "summary.json", "resumes.jsonl", "rollouts.jsonl")


@dataclass(frozen=True, slots=True)
class Broken:
    """What was done to a run and what came of it.

    Attributes:
        file: Below the run's directory.
        how: The kind of fault.
        outcome: One of `OUTCOMES`.
        said: The lines that belong to it, or a traceback.
    """

    file: str
    how: str
    outcome: str
    said: str


def truncate(path: Path, chance: random.Random, others: list[Path]) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: chance.randrange(len(data))])


def empty(path: Path, chance: random.Random, others: list[Path]) -> None:
    path.write_bytes(b"")


def delete(path: Path, chance: random.Random, others: list[Path]) -> None:
    path.unlink()


def flip_bit(path: Path, chance: random.Random, others: list[Path]) -> None:
    data = bytearray(path.read_bytes())
    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    path.write_bytes(data)


def garbage(path: Path, chance: random.Random, others: list[Path]) -> None:
    path.write_bytes(chance.randbytes(chance.randrange(1, 4096)))


def swap(path: Path, chance: random.Random, others: list[Path]) -> None:
    alike = [
        p for p in others if p.suffix == path.suffix and p != path and p.read_bytes() != path.read_bytes()
    ]
    path.write_bytes(chance.choice(alike).read_bytes() if alike else b"swapped")


def unreadable(path: Path, chance: random.Random, others: list[Path]) -> None:
    if os.geteuid():
        path.chmod(0)
    else:  # whom no permission stops
        path.unlink()
        path.mkdir()


def retype(path: Path, chance: random.Random, others: list[Path]) -> None:
    """Gives a value of a JSON file another type; other files get garbage."""
    if path.suffix not in (".json", ".jsonl"):
        return garbage(path, chance, others)
    lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
    number = chance.randrange(len(lines))
    data = json.loads(lines[number])
    place: Any = data
    keys = list(place) if isinstance(place, dict) else []
    while keys:
        key = chance.choice(keys)
        if isinstance(place[key], dict) and place[key] and chance.random() < 0.7:
            place, keys = place[key], list(place[key])
            continue
        old = place[key]
        place[key] = chance.choice(
            [v for v in (None, "x", [1], {"a": 1}, 1e400, True, -3) if type(v) is not type(old)]
        )
        break
    lines[number] = json.dumps(data)
    path.write_text("\n".join(lines) + "\n")
    return None


FAULTS: tuple[Callable[[Path, random.Random, list[Path]], None], ...] = (
    truncate,
    empty,
    delete,
    flip_bit,
    flip_bit,
    garbage,
    swap,
    unreadable,
    retype,
    retype,
)


def run(count: int, seed: int, say: Callable[[Broken], None] = lambda broken: None) -> dict[str, int]:
    """Breaks ``count`` files, one at a time, of copies of one tiny run. Returns how many came to each of
    `OUTCOMES`.
    """
    chance, counts = random.Random(seed), Counter(dict.fromkeys(OUTCOMES, 0))
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            train([str(ROOT / "configs" / "tiny.yaml"), f"out={folder / 'made'}", *_RECIPE])
        for number in range(count):
            shutil.copytree(folder / "made", folder / "run")
            broken = _broken(folder / "run", chance, whole_step=number % _FULL_EVERY == 0)
            counts[broken.outcome] += 1
            say(broken)
            shutil.rmtree(folder / "run")
    return dict(counts)


def _broken(run_: Path, chance: random.Random, whole_step: bool) -> Broken:
    files = [p for p in sorted(run_.rglob("*")) if p.is_file() and _read_by_a_resume(p, run_)]
    path, fault = chance.choice(files), chance.choice(FAULTS)
    before, meant = path.read_bytes(), _meaning(path)
    fault(path, chance, files)
    name = path.relative_to(run_)
    if name.parts[0] == "checkpoint" and chance.random() < _BOTH:
        delete(run_ / "checkpoint.old" / Path(*name.parts[1:]), chance, files)
    same = path.is_file() and (path.read_bytes() == before or (meant is not None and _meaning(path) == meant))
    out = io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _go_on(run_, whole_step)
    except UserError as error:
        line = str(error)
        return Broken(
            str(name),
            fault.__name__,
            "refused in a line" if "\n" not in line and str(run_) in line else "silent",
            line,
        )
    except Exception:
        return Broken(str(name), fault.__name__, "traceback", traceback.format_exc())
    text = " ".join(out.getvalue().split())  # a terminal's lines may be broken
    named = (
        (f"{path}", f"{path.parent}: no checksums")
        if path.name != "config.json"
        else (f"{path}", "changed since the checkpoint")
    )
    said = any(name in text for name in named)
    return Broken(
        str(name),
        fault.__name__,
        "went on and said so" if said else "made no difference" if same else "silent",
        text,
    )


def _read_by_a_resume(path: Path, run_: Path) -> bool:
    top, *below = path.relative_to(run_).parts
    newest = max((p.name for p in (run_ / "drafters").iterdir()), default="")
    return (
        path.name not in _NOT_READ
        and top not in ("checkpoint.old", "drafter")
        and (top != "drafters" or below[0] == newest)
    )


def _meaning(path: Path) -> Any:
    """What a JSON file says, however it is written."""
    try:
        return json.loads(path.read_text()) if path.suffix == ".json" else None
    except (OSError, ValueError):
        return None


def _go_on(run_: Path, whole_step: bool) -> None:
    """What ``--resume`` does before its first step; with ``whole_step`` that one too."""
    if whole_step:
        train(["--resume", str(run_), "steps=4"])
        return
    config = resumed_recipe(run_, [], print)
    accelerator = make_accelerator(config, timedelta(minutes=1))
    checkpoint = open_run(config, run_, 1, True, [])
    with Tracker(config, run_, active=True) as tracker:
        trainer = Trainer(config, run_, accelerator, checkpoint, tracker)
        with trainer.scoring:
            trainer.drafter.finish()
    try:
        write_report(run_)
    except UserError as error:  # as at the end of a run: the policy is in the checkpoint
        print(f"report: {error}")


if __name__ == "__main__":
    found = run(
        int(sys.argv[1]),
        int(sys.argv[2]),
        lambda broken: print(broken.outcome, broken.how, broken.file, broken.said[-600:], sep="  "),
    )
    print(json.dumps(found))
