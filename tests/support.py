"""Trainers and training processes for tests."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import pytest

from paceline.rl import run
from paceline.rl.monitoring.tracker import Tracker
from paceline.rl.recipe import load_config
from paceline.rl.trainer import Trainer, make_accelerator

ROOT = Path(__file__).parents[1]


def train_here(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    """``launch/train.py`` with these arguments, in this process, whose threads and allocator stay as they
    are.
    """
    monkeypatch.setattr(run, "fit_process", lambda local_world_size: None)
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    run.main(None)


@contextmanager
def tiny_trainer(
    folder: Path, monkeypatch: pytest.MonkeyPatch, reward: str, *options: str
) -> Iterator[Trainer]:
    """A trainer of the tiny recipe in this process, with plain decoding and a reward: an expression over
    ``completions``.
    """
    monkeypatch.setenv("PACELINE_CACHE", str(folder / "cache"))
    name = f"reward_{folder.name}"
    (folder / f"{name}.py").write_text(f"def score(prompts, completions, **columns):\n    return {reward}\n")
    monkeypatch.chdir(folder)
    plain = [
        "speculation.drafters=[suffix]",
        "speculation.strategy=plain",
        "update.kl_coef=0.0",
        "measure.plain_every=0",
    ]
    one = [f"task.reward={name}:score", "update.minibatches=1", f"out={folder / 'run'}"]
    config = load_config(ROOT / "configs" / "tiny.yaml", [*plain, *one, *options])
    (folder / "run").mkdir()
    with Tracker(config, folder / "run", active=False) as tracker:
        trainer = Trainer(
            config, folder / "run", make_accelerator(config, timedelta(minutes=1)), None, tracker
        )
        with trainer.scoring:
            yield trainer
