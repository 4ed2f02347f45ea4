"""Restores an optimizer's moments from a checkpoint."""

from __future__ import annotations

from pathlib import Path

from paceline.drafter_trainer.errors import OptimizerStateError
from paceline.drafter_trainer.storage.optimizer_state import read_state
from paceline.rl.errors import UserError
from paceline.rl.sharding import TrainedModule


def restore_moments(trained: TrainedModule, stem: Path) -> None:
    """Loads an optimizer's state, which may have been saved under another sharding. Collective.

    Args:
        trained: The model with its optimizer.
        stem: Path of the state's files without their extension.

    Raises:
        UserError: for files that are truncated, missing, or of another optimizer.
    """
    try:
        trained.load_optimizer_state(read_state(stem))
    except OptimizerStateError as error:
        raise UserError(str(error)) from None
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(
            f"{stem}: of another optimizer ({error}); resume with the recipe of the run"
        ) from None
