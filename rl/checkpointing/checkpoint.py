"""Whole checkpoints of a run: written, swapped atomically, found again and checked."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError

from paceline.drafter_trainer.storage.checksums import changed_files, sync, write_checksums
from paceline.rl.checkpointing.run_logs import log_sums
from paceline.rl.errors import UserError
from paceline.rl.process.files import read_object

# Names of checkpoints, the newest first. The older one stays until the next one is written, for a run that
# finds the newest broken.
CHECKPOINTS = ("checkpoint", "checkpoint.old")
# A run can resume without these: they only make it faster.
_OPTIONAL = ("drafter_optimizer", "drafter_ensemble", "drafter", "selector.json", "lengths.safetensors")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint that a run can resume from.

    Attributes:
        path: The checkpoint's directory.
        steps_done: The number of finished steps behind it.
        state: The states of the run's parts, by their names.
        broken: The parts that cannot be used, of ``drafter``, ``drafter_optimizer``, ``drafter_ensemble``,
            ``selector.json`` and ``lengths.safetensors``.
    """

    path: Path
    steps_done: int
    state: dict[str, Any] = field(default_factory=dict)
    broken: frozenset[str] = frozenset()


Writer = Callable[[Path], None]
"""Writes one part of a checkpoint into its directory; called on the main rank alone."""


class Stateful(Protocol):
    """A part of a run whose state a checkpoint keeps as JSON, under the name that it is registered by."""

    def state(self) -> Any:
        """Returns the state as JSON data. Collective where ranks differ."""
        ...

    def load_state(self, state: Any) -> None:
        """Restores what `state` returned.

        Raises:
            KeyError, TypeError, ValueError, AttributeError: for data of another form.
        """
        ...


@dataclass(frozen=True, slots=True)
class AttributeState:
    """Keeps one attribute of an object in checkpoints.

    Attributes:
        owner: The object.
        name: The attribute's name; its value is JSON data.
    """

    owner: Any
    name: str

    def state(self) -> Any:
        """Returns the attribute."""
        return getattr(self.owner, self.name)

    def load_state(self, state: Any) -> None:
        """Sets the attribute."""
        setattr(self.owner, self.name, state)


def save_checkpoint(
    run: Path,
    steps_done: int,
    writers: Sequence[Writer],
    state: dict[str, Any] | None = None,
    recipe: dict[str, Any] | None = None,
) -> None:
    """Writes ``checkpoint/`` of a run whole, and keeps the last one as ``checkpoint.old`` until the next.

    The new one is written beside the last one and flushed to the disk; then the two are swapped by renaming.
    A whole checkpoint exists at every instant.

    Args:
        run: The run's directory.
        steps_done: The number of finished steps.
        writers: Writers of the checkpoint's parts.
        state: The states of the run's `Stateful` parts by their names.
        recipe: The run's recipe as plain data; what may not change on resume is compared with it.

    Raises:
        UserError: when the disk is full or not writable; the previous checkpoint stays.
    """
    building, final, old = run / "checkpoint.new", run / "checkpoint", run / "checkpoint.old"
    try:
        shutil.rmtree(building, ignore_errors=True)
        if final.exists():  # otherwise the older one is the only one
            shutil.rmtree(old, ignore_errors=True)
        building.mkdir(parents=True)
        for write in writers:
            write(building)
        if recipe is not None:
            (building / "recipe.json").write_text(json.dumps(recipe, indent=2) + "\n")
        # Random numbers are functions of (seed, step): the step is all the state that they have.
        kept = {"steps_done": steps_done, "logs": log_sums(run), **(state or {})}
        (building / "state.json").write_text(json.dumps(kept))
        write_checksums(building)
        if final.exists():
            final.rename(old)
        building.rename(final)
        sync(run)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(building, ignore_errors=True)
        raise UserError(
            f"{building}: the checkpoint could not be written ({error}); free disk space, then --resume {run}"
        ) from None


def has_checkpoint(run: Path) -> bool:
    """Returns whether a run has written a checkpoint, whole or not."""
    return any((run / name).is_dir() for name in CHECKPOINTS)


def find_checkpoint(run: Path, say: Callable[[str], None] = lambda line: None) -> Checkpoint:
    """Finds the last whole checkpoint of a run. Every file is compared with its checksum.

    Args:
        run: The run's directory.
        say: Receives a line for each checkpoint that is skipped and each part that is left out.

    Raises:
        UserError: when there is no whole checkpoint.
    """
    problems: list[str] = []
    for path in (run / name for name in CHECKPOINTS):
        if not path.is_dir():
            continue
        try:
            found = _checked(path, say)
        except UserError as error:
            problems.append(str(error))
            continue
        for problem in problems:
            say(f"{problem}; going on from the older {path}, after step {found.steps_done}")
        return found
    if problems:
        raise UserError(
            f"{'; '.join(problems)}; no older checkpoint is whole: put back a copy of that file, or start "
            "anew with another out="
        )
    raise UserError(
        f"--resume {run}: no checkpoint there; it was stopped before its first save, start it again without "
        "--resume"
    )


def _checked(path: Path, say: Callable[[str], None]) -> Checkpoint:
    changed = changed_files(path)
    if changed is None:
        say(
            f"{path}: no checksums to compare its files with (from an older release, or lost); going on "
            "without"
        )
    broken: set[str] = set()
    for name, reason in (changed or {}).items():
        extra = next((part for part in _OPTIONAL if name.startswith(part)), None)
        if extra is None:
            raise UserError(f"{path / name}: {reason}")
        broken.add(extra)
        say(f"{path / name}: {reason}; going on without")
    state = read_object(path / "state.json")
    for key, (kind, required) in _STATE.items():
        value = state.get(key)
        fits = (
            isinstance(value, kind)
            and not isinstance(value, bool)
            and (not isinstance(value, float) or math.isfinite(value))
        )
        if not fits and (required or value is not None):
            raise UserError(f"{path / 'state.json'}: {key} is {value!r:.40}")
    if state["steps_done"] < 0:
        raise UserError(f"{path / 'state.json'}: steps_done is {state['steps_done']}")
    return Checkpoint(path, state["steps_done"], state, frozenset(broken))


_STATE: dict[str, tuple[Any, bool]] = {
    "steps_done": (int, True),
    "kl_coef": (int | float, False),
    "entropy": (int | float, False),
    "prompts": (dict, False),
    "guard": (dict, False),
    "evaluation": (dict, False),
    "open": (list, False),
    "logs": (dict, False),
}


def set_aside_broken(run: Path, used: Checkpoint) -> None:
    """Renames a broken ``checkpoint`` to ``checkpoint.broken``, so that the older one in use is kept."""
    newest = run / CHECKPOINTS[0]
    if used.path != newest and newest.exists():
        shutil.rmtree(run / "checkpoint.broken", ignore_errors=True)
        newest.rename(run / "checkpoint.broken")
