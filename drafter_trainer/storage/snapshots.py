"""The last few drafters of a run, written beside it while it goes on."""

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
from paceline.drafter_trainer.storage.optimizer_state import write_state
from paceline.rollout.drafters.eagle3_model import Eagle3Model


class DrafterSnapshots:
    """``folder/step-N``: a drafter's trainable tensors and its optimizer's (``optimizer``), each whole or
    absent.

    A step waits only for the copy in memory; a thread writes it under another name and renames it. What is
    not yet written when the next one comes is waited for, so that at most one copy is held.

    Args:
        folder: Made when first wanted.
        keep: How many stay.

    Attributes:
        seconds: What the last `save` took of the caller's time.
    """

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self._folder, self._keep = folder, keep
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="drafter-snapshot")
        self._writing: Future[None] | None = None
        self.seconds = 0.0

    def save(self, step: int, model: Eagle3Model, optimizer: torch.optim.Optimizer) -> str | None:
        """Begins to write. Returns one line about what became of the last one, if it failed."""
        begin = time.perf_counter()
        problem = self.wait()
        held, state = copy.deepcopy(model), copy.deepcopy(optimizer.state_dict())
        self._writing = self._writer.submit(self._write, step, held, state)
        self.seconds = time.perf_counter() - begin
        return problem

    def wait(self) -> str | None:
        """Returns when nothing is being written any more; one line if that failed."""
        writing, self._writing = self._writing, None
        if writing is None:
            return None
        error = writing.exception()
        return None if error is None else f"a drafter snapshot could not be written ({error}); free some disk"

    def _write(self, step: int, model: Eagle3Model, state: dict[str, Any]) -> None:
        building, final = self._folder / f".step-{step}", self._folder / f"step-{step}"
        shutil.rmtree(building, ignore_errors=True)
        try:
            save_drafter(model, building, torch.float32)
            write_state(state, building / "optimizer")
            write_checksums(building)
            shutil.rmtree(final, ignore_errors=True)
            building.rename(final)
        except (OSError, SafetensorError):
            shutil.rmtree(building, ignore_errors=True)
            raise
        for old in [path for _, path in self._newest_first()][self._keep :]:
            shutil.rmtree(old, ignore_errors=True)

    def _newest_first(self) -> list[tuple[int, Path]]:
        found = []
        for path in self._folder.glob("step-*"):
            number = path.name.removeprefix("step-")
            if number.isdecimal():
                found.append((int(number), path))
        return sorted(found, reverse=True)

    def newest(
        self, vocab_size: int, hidden_size: int, **wanted: Any
    ) -> tuple[tuple[int, Path, Eagle3Model] | None, list[str]]:
        """The newest whole one, as (step, directory, float32 drafter), and a line for every broken one that
        was passed over.

        Args:
            vocab_size, hidden_size: Of the policy.
            **wanted: ``tap_layers`` and ``draft_vocab_size`` of `load_drafter`.
        """
        problems: list[str] = []
        for step, path in self._newest_first():
            changed = changed_files(path)
            if changed is None:
                problems.append(f"{path}: no checksums to compare its files with; taken as it is")
            elif changed:
                problems += [f"{path / name}: {reason}" for name, reason in changed.items()]
                continue
            try:
                return (step, path, load_drafter(path, vocab_size, hidden_size, **wanted)), problems
            except DrafterError as error:
                problems.append(str(error))
        return None, problems
