"""Shows a command's progress: bars with the remaining time in a terminal, occasional lines in a file."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn
from rich.text import Text

from paceline.rl.process.console import console as console_for

# Seconds before the first line and between lines, so that short phases leave nothing in a log.
_FIRST_LINE_SECONDS, _LINE_INTERVAL_SECONDS = 15.0, 30.0


def duration(seconds: float) -> str:
    """Formats seconds as text such as ``42 s``, ``7 min`` or ``2 h 05 min``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


class Phase:
    """Shows the progress of one piece of work.

    Args:
        display: Display that shows it.
        name: Name of the work.
        total: Amount of work; None if it is not known.
        unit: Unit of the amount, such as ``sequences``.
        announced: Whether a file gets a line at the start and at the end, however short the work is.
        lines: Whether a file gets lines in between.
    """

    def __init__(
        self, display: Display, name: str, total: float | None, unit: str, announced: bool, lines: bool
    ) -> None:
        self._display, self._name, self._total, self._unit = display, name, total, unit
        self._announced, self._lines = announced, lines
        self._began = self._last_line = display.clock()
        self._interval = _FIRST_LINE_SECONDS
        self._task = (
            None if display.bars is None else display.bars.add_task(name, total=total, note="", unit=unit)
        )
        if announced and self._task is None:
            display.say(name)

    def update(
        self, done: float, note: str = "", total: float | None = None, unit: str | None = None
    ) -> None:
        """Updates the display with the amount of work that is done.

        Args:
            done: Amount of work done since the phase began.
            note: Further text, such as a loss.
            total: New total amount; None keeps the previous one.
            unit: New unit; None keeps the previous one.
        """
        self._total = self._total if total is None else total
        self._unit = self._unit if unit is None else unit
        if self._display.bars is not None and self._task is not None:
            self._display.bars.update(
                self._task, completed=done, total=self._total, note=note, unit=self._unit
            )
            return
        now = self._display.clock()
        if self._display.active and self._lines and now - self._last_line >= self._interval:
            self._last_line, self._interval = now, _LINE_INTERVAL_SECONDS
            self._display.say("  ".join(part for part in (self._line(done, now), note) if part))

    def _line(self, done: float, now: float) -> str:
        if self._total is None:
            return f"{self._name}: {duration(now - self._began)} so far"
        unit = f" {self._unit}" if self._unit else ""
        left = (
            f", about {duration((now - self._began) / done * (self._total - done))} left" if done > 0 else ""
        )
        return f"{self._name}: {done:.0f} of {self._total:.0f}{unit}{left}"

    def close(self, finished: bool) -> None:
        """Removes the bar, or prints to a file how long an announced phase took.

        Args:
            finished: Whether the work was completed; a file gets no line for work that failed.
        """
        if self._display.bars is not None and self._task is not None:
            self._display.bars.remove_task(self._task)
            if not self._display.bars.task_ids:
                self._display.bars.stop()  # lets other processes write to the terminal between phases
        elif self._announced and finished:
            self._display.say(f"{self._name}: done in {duration(self._display.clock() - self._began)}")


class Display:
    """Shows the progress of one process. It is a context manager, and bars are drawn inside its block.

    Entering it turns off the progress bars of transformers' loading and saving, which would hide these.

    Args:
        active: Whether this process shows anything; of several ranks, only one does.
        console: Console to print to; None for standard output.
        clock: Monotonic clock in seconds.
    """

    def __init__(
        self, active: bool = True, console: Console | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.active, self.clock = active, clock
        self.console = console_for() if console is None else console
        self.bars: Progress | None = None

    def __enter__(self) -> Display:
        import transformers

        transformers.utils.logging.disable_progress_bar()
        if self.active and self.console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                _DoneColumn(),
                TextColumn("{task.fields[note]}"),
                TimeElapsedColumn(),
            )
            self.bars = Progress(*columns, _RemainingColumn(), console=self.console, transient=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bars is not None:
            self.bars.stop()
            self.bars = None

    def say(self, text: str) -> None:
        """Prints a line."""
        self.show(text)

    def show(self, what: RenderableType) -> None:
        """Prints a line or a table."""
        if self.active:
            self.console.print(what, highlight=False, markup=False, soft_wrap=isinstance(what, str))
            self.console.file.flush()

    @contextmanager
    def phase(
        self,
        name: str,
        total: float | None = None,
        unit: str = "",
        announced: bool = False,
        lines: bool = True,
    ) -> Iterator[Phase]:
        """Shows a phase while the block runs; the arguments are those of `Phase`."""
        if self.bars is not None:
            self.bars.start()
        phase = Phase(self, name, total, unit, announced and self.active, lines)
        finished = False
        try:
            yield phase
            finished = True
        finally:
            phase.close(finished)


class _DoneColumn(ProgressColumn):
    """Shows the amount done and the total, if the total is known."""

    def render(self, task: Task) -> Text:
        """Formats the task's progress."""
        if task.total is None:
            return Text("")
        return Text(
            " ".join(
                part for part in (f"{task.completed:.0f}/{task.total:.0f}", str(task.fields["unit"])) if part
            )
        )


class _RemainingColumn(ProgressColumn):
    """Shows an estimate of the remaining time."""

    def render(self, task: Task) -> Text:
        """Formats the task's remaining time."""
        if task.total is None or not task.completed or task.elapsed is None:
            return Text("")
        return Text(f"{duration(task.elapsed / task.completed * (task.total - task.completed))} left")
