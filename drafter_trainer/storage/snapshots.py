"""Writes snapshots of a run's last drafters in the background."""

from __future__ import annotations

import copy
import shutil
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from paceline.drafter_trainer.errors import DrafterError
from paceline.drafter_trainer.storage.checkpoint import load_drafter, save_drafter
from paceline.drafter_trainer.storage.checksums import changed_files, write_checksums
from paceline.drafter_trainer.storage.ensemble import EnsembleState, write_ensemble
from paceline.drafter_trainer.storage.optimizer_state import write_state
from paceline.drafter_trainer.storage.removal import clear_removed, remove_directory
from paceline.rollout.drafters.eagle3_model import Eagle3Model


class DrafterSnapshots:
    """Keeps the last drafters of a run in ``folder/step-N``.

    Each is there with its optimizer's state (``optimizer``), and with the ensemble that it was chosen from if
    there is one (``ensemble``).

    A step waits only for a copy in memory. A background thread writes it under a temporary name and renames
    it, and renames old ones before it removes them, so that each snapshot is complete or absent. A snapshot
    waits until the one before is written, so that at most one copy is held in memory.

    Args:
        folder: Directory of the snapshots; created on first use.
        keep: Number of snapshots to keep.

    Attributes:
        seconds: Time that the last `save` took from its caller.
    """

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self._folder, self._keep = folder, keep
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="drafter-snapshot")
        self._writing: Future[None] | None = None
        self.seconds = 0.0

    def save(
        self,
        step: int,
        model: Eagle3Model,
        optimizer: torch.optim.Optimizer,
        ensemble: EnsembleState | None = None,
    ) -> str | None:
        """Starts writing a snapshot; returns a one-line problem if writing the last one failed."""
        start = time.perf_counter()
        problem = self.wait()
        copies = copy.deepcopy((model, optimizer.state_dict(), ensemble))
        self._writing = self._writer.submit(self._write, step, *copies)
        self.seconds = time.perf_counter() - start
        return problem

    def wait(self) -> str | None:
        """Waits until nothing is being written any more; returns a one-line problem if writing failed."""
        writing, self._writing = self._writing, None
        if writing is None:
            return None
        error = writing.exception()
        return None if error is None else f"a drafter snapshot could not be written ({error}); free some disk"

    def _write(
        self, step: int, model: Eagle3Model, state: dict[str, Any], ensemble: EnsembleState | None
    ) -> None:
        building, final = self._folder / f".step-{step}", self._folder / f"step-{step}"
        shutil.rmtree(building, ignore_errors=True)
        try:
            save_drafter(model, building, torch.float32)
            write_state(state, building / "optimizer")
            if ensemble is not None:
                write_ensemble(ensemble, building / "ensemble")
            write_checksums(building)
            remove_directory(final)
            building.rename(final)
        except (OSError, SafetensorError):
            shutil.rmtree(building, ignore_errors=True)
            raise
        for old in [path for _, path in self._newest_first()][self._keep :]:
            remove_directory(old)
        clear_removed(self._folder)

    def _newest_first(self) -> list[tuple[int, Path]]:
        snapshots = []
        for path in self._folder.glob("step-*"):
            number = path.name.removeprefix("step-")
            if number.isdecimal():
                snapshots.append((int(number), path))
        return sorted(snapshots, reverse=True)

    def newest(
        self, vocab_size: int, hidden_size: int, **requirements: Any
    ) -> tuple[tuple[int, Path, Eagle3Model] | None, list[str]]:
        """Loads the newest usable snapshot.

        Args:
            vocab_size: Number of tokens of the policy's vocabulary.
            hidden_size: Size of the policy's hidden states.
            **requirements: ``tap_layers`` and ``draft_vocab_size`` of `load_drafter`.

        Returns:
            The snapshot as (step, directory, float32 drafter), or None, and one line for each problem found
            on the way.
        """
        problems: list[str] = []
        for step, path in self._newest_first():
            changed = changed_files(path)
            if changed is None:
                problems.append(f"{path}: no checksums to compare its files with; used without a check")
            elif changed:
                problems += [f"{path / name}: {reason}" for name, reason in changed.items()]
                continue
            try:
                return (step, path, load_drafter(path, vocab_size, hidden_size, **requirements)), problems
            except DrafterError as error:
                problems.append(str(error))
        return None, problems
