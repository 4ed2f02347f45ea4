"""Where metrics go: JSONL always, wandb and TensorBoard by config, and how far the run is to the user."""

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

_STEPS_BACK = 5  # whose mean the time left goes by
_NAMES = {
    "rollout": "rollouts",
    "score": "scoring",
    "reference": "log-probs under the reference",
    "drafter": "drafter training",
    "wait": "waiting for the other ranks",
    "measure": "the same plainly, to measure",
    "evaluate": "evaluation",
    "gather": "gathering weights",
    "sync": "sharing weights and drafter",
}  # of phases, as they are shown


class Tracker:
    """Rank 0's view of the run; on other ranks every method does nothing.

    Steps are counted from 1 wherever a person reads them: in lines, in the report, on the axes of wandb and
        TensorBoard. The key
    ``step`` in ``metrics.jsonl``, ``timeline.jsonl`` and ``rollouts.jsonl`` is an index, from 0.

    Args:
        config: The recipe.
        run: The run's directory.
        active: Whether this is rank 0.
        first_step: Where the run goes on from: what a board shows of later steps, which were lost, is taken
            back.
        display: What this process shows; None makes one for a rank that shows nothing, or on standard output.
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

            purge = self._first_step + 1 if self._first_step else None  # steps are counted from 1 there
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
        """Shows a phase of a step, whose index this is, while it lasts."""
        if not self._ends:
            self._ends.append(self.display.clock())  # where the first step begins
        return self.display.phase(f"step {step + 1}/{self._config.steps}  {_NAMES.get(name, name)}")

    def steps(self, first: int) -> AbstractContextManager[Phase]:
        """Shows all steps that remain, from the one of this index on; in a file their own lines do."""
        return self.display.phase("all steps", self._config.steps - first, lines=False)

    def time_left(self, step: int) -> str:
        """Says how long the run takes from the end of a step on, by the mean of the last few; nothing after
        the last.
        """
        self._ends = [*self._ends, self.display.clock()][-_STEPS_BACK - 1 :]
        left = self._config.steps - step - 1
        if left <= 0 or len(self._ends) < 2:
            return ""
        each = (self._ends[-1] - self._ends[0]) / (len(self._ends) - 1)
        return f"  about {duration(each * left)} left"

    def log(self, step: int, metrics: dict[str, Any], timeline: list[dict[str, Any]]) -> None:
        """Writes the metrics of the step of this index, and each rank's timeline."""
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
    """The id under which a run is known to wandb, from its start to its end; kept in ``wandb.json``."""
    path = run / "wandb.json"
    try:
        return str(read_object(path)["id"])
    except (UserError, KeyError):
        made = secrets.token_hex(6)
        write_atomically(path, json.dumps({"id": made}) + "\n")
        return made
