"""Writes a run's metrics to JSON Lines, wandb and TensorBoard, and shows its progress to the user."""

from __future__ import annotations

import json
import os
import secrets
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any

from paceline.rl.config.run import RunConfig, to_dict
from paceline.rl.errors import UserError
from paceline.rl.process.files import append_line, read_object, write_atomically
from paceline.rl.process.progress import Display, Phase, duration

_AVERAGED_STEPS = 5  # the remaining time is estimated from the mean duration of the last steps
_PHASE_LABELS = {
    "rollout": "rollouts",
    "score": "scoring",
    "reference": "log-probs under the reference",
    "drafter": "drafter training",
    "wait": "waiting for the other ranks",
    "measure": "plain decoding for comparison",
    "evaluate": "evaluation",
    "gather": "gathering weights",
    "sync": "sharing weights and drafter",
}


class Tracker:
    """Logs metrics and shows progress on rank 0; on other ranks it logs and shows nothing.

    It is a context manager. Steps are counted from 1 wherever a person reads them: in printed lines, in the
    report, and on the axes of wandb and TensorBoard. The key ``step`` in ``metrics.jsonl``,
    ``timeline.jsonl`` and ``rollouts.jsonl`` is an index that starts at 0.

    Args:
        config: The recipe.
        run: The run's directory.
        active: Whether this is rank 0.
        first_step: Index of the first step to come. TensorBoard drops what an interrupted run logged of this
            step and later ones.
        display: Display of this process; None creates one on standard output.
    """

    def __init__(
        self, config: RunConfig, run: Path, active: bool, first_step: int = 0, display: Display | None = None
    ) -> None:
        self.active = active
        self.display = Display(active) if display is None else display
        self._run = run
        self._config = config
        self._first_step = first_step
        self._wandb: Any = None
        self._board: Any = None
        self._ends: list[float] = []

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

            purge = self._first_step + 1 if self._first_step else None  # TensorBoard's steps start at 1
            self._board = SummaryWriter(str(self._run / "tensorboard"), purge_step=purge)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish(exit_code=0 if kind is None else 1)

    def say(self, text: str) -> None:
        """Prints a line for the user."""
        self.display.say(text)

    def phase(self, step: int, name: str) -> AbstractContextManager[Phase]:
        """Shows a phase of a step while the block runs.

        Args:
            step: Index of the step.
            name: Name of the phase, such as ``rollout``.
        """
        if not self._ends:
            self._ends.append(self.display.clock())  # the start of the first step
        return self.display.phase(f"step {step + 1}/{self._config.steps}  {_PHASE_LABELS.get(name, name)}")

    def steps(self, first: int) -> AbstractContextManager[Phase]:
        """Shows the progress over all remaining steps; a file only gets the lines of the steps themselves.

        Args:
            first: Index of the first remaining step.
        """
        return self.display.phase("all steps", self._config.steps - first, lines=False)

    def time_left(self, step: int) -> str:
        """Returns text with the estimated time until the end of the run; it is empty after the last step.

        Call it at the end of each step, since it records the time of the call.

        Args:
            step: Index of the step that has ended.
        """
        self._ends = [*self._ends, self.display.clock()][-_AVERAGED_STEPS - 1 :]
        remaining = self._config.steps - step - 1
        if remaining <= 0 or len(self._ends) < 2:
            return ""
        step_seconds = (self._ends[-1] - self._ends[0]) / (len(self._ends) - 1)
        return f"  about {duration(step_seconds * remaining)} left"

    def log(self, step: int, metrics: dict[str, Any], timeline: list[dict[str, Any]]) -> None:
        """Writes the metrics and the timeline of a step.

        Args:
            step: Index of the step.
            metrics: Metrics of the step; wandb and TensorBoard get the numbers among them.
            timeline: Timeline of each rank.
        """
        if not self.active:
            return
        append_line(self._run / "metrics.jsonl", {"step": step, **metrics})
        append_line(self._run / "timeline.jsonl", {"step": step, "ranks": timeline})
        scalars = {k: v for k, v in metrics.items() if isinstance(v, int | float) and not isinstance(v, bool)}
        if self._wandb is not None:
            self._wandb.log(scalars, step=step + 1)
        if self._board is not None:
            for name, value in scalars.items():
                self._board.add_scalar(name, value, step + 1)


def _wandb_id(run: Path) -> str:
    """Returns the run's wandb id, which stays the same when the run resumes; ``wandb.json`` stores it."""
    path = run / "wandb.json"
    try:
        return str(read_object(path)["id"])
    except (UserError, KeyError):
        new_id = secrets.token_hex(6)
        write_atomically(path, json.dumps({"id": new_id}) + "\n")
        return new_id
