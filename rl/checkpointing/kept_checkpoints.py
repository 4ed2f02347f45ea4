"""Keeps earlier checkpoints of a run beside its latest: the best by evaluation, and those of recent saves."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from paceline.drafter_trainer.storage.removal import clear_removed, remove_directory
from paceline.rl.errors import UserError

_FOLDER = "checkpoints"
_STEP = re.compile(r"step-(\d+)")


def keep_checkpoint(run: Path, steps_done: int, last: int, best: bool) -> None:
    """Copies the checkpoint just written to ``checkpoints/step-N``, ``checkpoints/best`` or both.

    The copies are hard links to the files of ``checkpoint/``, which are never modified. So a copy takes up
    disk space only once ``checkpoint/`` holds a newer one.

    Args:
        run: The run's directory.
        steps_done: Number of steps done at the checkpoint.
        last: Number of recent checkpoints to keep; 1 keeps only ``checkpoint/``.
        best: Whether this checkpoint is the best so far.

    Raises:
        UserError: If the disk is full; ``checkpoint/`` itself is intact.
    """
    folder = run / _FOLDER
    try:
        if last > 1:
            _copy(run / "checkpoint", folder / f"step-{steps_done}")
            # steps above steps_done belong to an attempt that the run was reset from: they are deleted first
            for _, path in sorted(
                _steps(folder), key=lambda kept: (kept[0] <= steps_done, kept[0]), reverse=True
            )[last:]:
                remove_directory(path)
            clear_removed(folder)
        if best:
            _copy(run / "checkpoint", folder / "best")
    except OSError as error:
        raise UserError(
            f"{folder}: the checkpoint could not be kept ({error}); free disk space, then --resume {run}"
        ) from None


def find_kept(run: Path, name: str | None) -> Path:
    """Returns the directory of one of a run's checkpoints.

    Args:
        run: The run's directory.
        name: Name such as ``best`` or ``step-40``; None for the latest.

    Raises:
        UserError: If there is no such checkpoint; the message lists those that exist.
    """
    path = run / "checkpoint" if name is None else run / _FOLDER / name
    if not (path / "policy").is_dir():
        kept = sorted(p.name for p in (run / _FOLDER).glob("*"))
        advice = (
            f"; write one of {', '.join(kept)}"
            if kept
            else "; name the directory of a run that has saved one"
        )
        raise UserError(f"{path}: no checkpoint there{advice}")
    return path


def _steps(folder: Path) -> list[tuple[int, Path]]:
    return [(int(match.group(1)), path) for path in folder.iterdir() if (match := _STEP.fullmatch(path.name))]


def _copy(source: Path, target: Path) -> None:
    """Builds a copy out of hard links and renames it to the target, replacing an existing one."""
    building = target.with_name(target.name + ".new")
    shutil.rmtree(building, ignore_errors=True)
    target.parent.mkdir(exist_ok=True)
    shutil.copytree(source, building, copy_function=_link)
    previous = target.with_name(target.name + ".old")
    shutil.rmtree(previous, ignore_errors=True)
    if target.exists():
        target.rename(previous)
    building.rename(target)
    shutil.rmtree(previous, ignore_errors=True)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copy2(source, target)
