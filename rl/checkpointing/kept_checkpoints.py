"""Checkpoints that a run keeps beside its last one: the best by evaluation, and those of the last saves."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from paceline.rl.errors import UserError

_FOLDER = "checkpoints"
_STEP = re.compile(r"step-(\d+)")


def keep_checkpoint(run: Path, steps_done: int, last: int, best: bool) -> None:
    """Keeps the checkpoint that was just written, as ``checkpoints/step-N`` where several are kept and as
    ``checkpoints/best``.

    The copies share their files with ``checkpoint/`` (hard links; files of a checkpoint are never written
    again), so that they take room on the disk once it has moved on.

    Args:
        run: The run's directory.
        steps_done: Steps behind the checkpoint.
        last: How many checkpoints of the last saves to keep; 1 keeps none beside ``checkpoint/``.
        best: Whether this one is the best so far.

    Raises:
        UserError: when the disk is full; the checkpoint itself is whole.
    """
    folder = run / _FOLDER
    try:
        if last > 1:
            _copy(run / "checkpoint", folder / f"step-{steps_done}")
            # steps above steps_done are of an attempt that the run went back behind: they are deleted first
            for _, path in sorted(
                _steps(folder), key=lambda kept: (kept[0] <= steps_done, kept[0]), reverse=True
            )[last:]:
                shutil.rmtree(path, ignore_errors=True)
        if best:
            _copy(run / "checkpoint", folder / "best")
    except OSError as error:
        raise UserError(
            f"{folder}: the checkpoint could not be kept ({error}); free some disk, then --resume {run}"
        ) from None


def find_kept(run: Path, name: str | None) -> Path:
    """Returns the directory of a run's checkpoint.

    Args:
        run: The run's directory.
        name: ``best``, ``step-40``, or None for the last one.

    Raises:
        UserError: when there is none of this name; it says which there are.
    """
    path = run / "checkpoint" if name is None else run / _FOLDER / name
    if not (path / "policy").is_dir():
        kept = sorted(p.name for p in (run / _FOLDER).glob("*"))
        there = (
            f"; kept are {', '.join(kept)}" if kept else "; name the directory of a run that has saved one"
        )
        raise UserError(f"{path}: no checkpoint there{there}")
    return path


def _steps(folder: Path) -> list[tuple[int, Path]]:
    return [(int(found.group(1)), path) for path in folder.iterdir() if (found := _STEP.fullmatch(path.name))]


def _copy(source: Path, target: Path) -> None:
    """Puts a copy of hard links in place by one renaming."""
    building = target.with_name(target.name + ".new")
    shutil.rmtree(building, ignore_errors=True)
    target.parent.mkdir(exist_ok=True)
    shutil.copytree(source, building, copy_function=_link)
    before = target.with_name(target.name + ".old")
    shutil.rmtree(before, ignore_errors=True)
    if target.exists():
        target.rename(before)
    building.rename(target)
    shutil.rmtree(before, ignore_errors=True)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copy2(source, target)
