"""How far a command is: bars with the time left in a terminal, plain lines now and then in a file."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn
from rich.text import Text

from paceline.rl.process.console import console as console_for

_FIRST_LINE, _BETWEEN_LINES = 15.0, 30.0  # seconds


def duration(seconds: float) -> str:
    """Formats seconds for a reader: ``42 s``, ``7 min``, ``2 h 05 min``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


class Phase:
    """One thing that takes a while.

    Args:
        display: Where it is shown.
        name: What is done.
        total: How much there is to do; None where that is not known.
        unit: What is counted, such as ``sequences``.
        announced: Whether a file gets a line at its begin and end, however short it is.
        lines: Whether a file gets lines in between.
    """

    def __init__(
        self, display: Display, name: str, total: float | None, unit: str, announced: bool, lines: bool
    ) -> None:
        self._display, self._name, self._total, self._unit = display, name, total, unit
        self._announced, self._lines = announced, lines
        self._began = self._said = display.clock()
        self._wait = _FIRST_LINE
        self._task = (
            None if display.bars is None else display.bars.add_task(name, total=total, note="", unit=unit)
        )
        if announced and self._task is None:
            display.say(name)

    def update(
        self, done: float, note: str = "", total: float | None = None, unit: str | None = None
    ) -> None:
        """Shows how much is done.

        Args:
            done: Of the total, since the phase began.
            note: What else there is to say, such as a loss.
            total: Where it is known only now.
            unit: Likewise.
        """
        self._total = self._total if total is None else total
        self._unit = self._unit if unit is None else unit
        if self._display.bars is not None and self._task is not None:
            self._display.bars.update(
                self._task, completed=done, total=self._total, note=note, unit=self._unit
            )
            return
        now = self._display.clock()
        if self._display.active and self._lines and now - self._said >= self._wait:
            self._said, self._wait = now, _BETWEEN_LINES
            self._display.say("  ".join(part for part in (self._line(done, now), note) if part))

    def _line(self, done: float, now: float) -> str:
        if self._total is None:
            return f"{self._name}: {duration(now - self._began)} so far"
        unit = f" {self._unit}" if self._unit else ""
        left = (
            f", about {duration((now - self._began) / done * (self._total - done))} left" if done > 0 else ""
        )
        return f"{self._name}: {done:.0f} of {self._total:.0f}{unit}{left}"

    def close(self, whole: bool) -> None:
        """Takes the bar away; in a file, says how long an announced phase took if it is ``whole``."""
        if self._display.bars is not None and self._task is not None:
            self._display.bars.remove_task(self._task)
            if not self._display.bars.task_ids:
                self._display.bars.stop()  # while nothing is shown, other processes may write to the terminal
        elif self._announced and whole:
            self._display.say(f"{self._name}: done in {duration(self._display.clock() - self._began)}")


class Display:
    """What one process shows of its work, as a context: bars are drawn inside of it.

    Also turns off the bars of transformers' loading and saving, which would bury these.

    Args:
        active: Whether this process shows anything; of several ranks, one does.
        console: Where; None for standard output.
        clock: Seconds that only go forward.
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
                _Done(),
                TextColumn("{task.fields[note]}"),
                TimeElapsedColumn(),
            )
            self.bars = Progress(*columns, _Left(), console=self.console, transient=True)
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
        """Prints a line, or a table."""
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
        """Shows a phase while the block runs; see `Phase`."""
        if self.bars is not None:
            self.bars.start()
        phase = Phase(self, name, total, unit, announced and self.active, lines)
        whole = False
        try:
            yield phase
            whole = True
        finally:
            phase.close(whole)


class _Done(ProgressColumn):
    """How many of how many, where that is known."""

    def render(self, task: Task) -> Text:
        if task.total is None:
            return Text("")
        return Text(
            " ".join(
                part for part in (f"{task.completed:.0f}/{task.total:.0f}", str(task.fields["unit"])) if part
            )
        )


class _Left(ProgressColumn):
    """The time left."""

    def render(self, task: Task) -> Text:
        if task.total is None or not task.completed or task.elapsed is None:
            return Text("")
        return Text(f"{duration(task.elapsed / task.completed * (task.total - task.completed))} left")
