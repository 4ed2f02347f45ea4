"""Where metrics go: JSONL always, wandb and TensorBoard by config, and a live line on the terminal."""

from __future__ import annotations

import json
import os
import secrets
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from rl.config import RunConfig, to_dict
from rl.errors import UserError
from rl.files import append_line, read_object, write_whole
from rollout import StepRecord


class Tracker:
    """Rank 0's view of the run; on other ranks every method does nothing.

    Args:
        config: The recipe.
        run: The run's directory.
        active: Whether this is rank 0.
        first_step: Where the run goes on from: what a board shows of later steps, which were lost, is taken back.
    """

    def __init__(self, config: RunConfig, run: Path, active: bool, first_step: int = 0) -> None:
        self.active = active
        self.console = Console(file=sys.stdout)
        self._run = run
        self._config = config
        self._first_step = first_step
        self._wandb: Any = None
        self._board: Any = None
        self._progress: Progress | None = None

    def __enter__(self) -> Tracker:
        if not self.active:
            return self
        tracking = self._config.tracking
        if tracking.wandb != "disabled":
            import wandb

            os.environ.setdefault("WANDB_SILENT", "true")
            self._wandb = wandb.init(
                project=tracking.wandb_project,
                name=self._run.name,
                dir=str(self._run),
                mode=tracking.wandb,
                config=to_dict(self._config),
                id=_wandb_id(self._run),
                resume="allow",
            )
        if tracking.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(self._run / "tensorboard"), purge_step=self._first_step or None)
        if self.console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[speed]:.0f} tokens/s, {task.fields[active]} active, {task.fields[strategy]}"),
                TimeElapsedColumn(),
            )
            self._progress = Progress(*columns, console=self.console, transient=True)
            self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if self._progress is not None:
            self._progress.stop()
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish(exit_code=0 if kind is None else 1)

    def say(self, text: str) -> None:
        """A line for the user."""
        if self.active:
            self.console.print(text, highlight=False)

    def rollout_progress(self, step: int, sequences: int) -> RolloutProgress:
        """A callback for the engine that shows this rank's rollout as it runs."""
        return RolloutProgress(self._progress if self.active else None, step, sequences)

    def log(self, step: int, metrics: dict[str, Any], timeline: list[dict[str, Any]]) -> None:
        """Writes one step's metrics, and each rank's timeline."""
        if not self.active:
            return
        append_line(self._run / "metrics.jsonl", {"step": step, **metrics})
        append_line(self._run / "timeline.jsonl", {"step": step, "ranks": timeline})
        scalars = {k: v for k, v in metrics.items() if isinstance(v, int | float) and not isinstance(v, bool)}
        if self._wandb is not None:
            self._wandb.log(scalars, step=step)
        if self._board is not None:
            for name, value in scalars.items():
                self._board.add_scalar(name, value, step)


class RolloutProgress:
    """Shows tokens a second and active sequences while the engine decodes."""

    def __init__(self, progress: Progress | None, step: int, sequences: int) -> None:
        self._progress = progress
        self._begin = time.perf_counter()
        self._tokens = 0
        if progress is not None:
            self._task = progress.add_task(f"step {step} rollout", total=sequences, speed=0.0, active=sequences, strategy="")
            self._sequences = sequences

    def __call__(self, record: StepRecord) -> None:
        if self._progress is None:
            return
        self._tokens += record.committed
        speed = self._tokens / max(time.perf_counter() - self._begin, 1e-9)
        ended = self._sequences - record.active
        self._progress.update(self._task, completed=ended, speed=speed, active=record.active, strategy=record.strategy)

    def close(self) -> None:
        """Takes the bar away."""
        if self._progress is not None:
            self._progress.remove_task(self._task)


def _wandb_id(run: Path) -> str:
    """The id under which a run is known to wandb, from its start to its end; kept in ``wandb.json``."""
    path = run / "wandb.json"
    try:
        return str(read_object(path)["id"])
    except (UserError, KeyError):
        made = secrets.token_hex(6)
        write_whole(path, json.dumps({"id": made}) + "\n")
        return made
