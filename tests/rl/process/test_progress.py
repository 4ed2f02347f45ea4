"""Bars in a terminal, plain lines in a file."""

import io

import pytest
from rich.console import Console
from rich.table import Table

from paceline.rl.monitoring.tracker import Tracker
from paceline.rl.process.console import console
from paceline.rl.process.progress import Display, duration
from paceline.rl.recipe import load_config
from tests.support import ROOT


class Seconds:
    """A clock that goes where it is told."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def shown_in_a_file(clock):
    out = io.StringIO()
    return Display(console=console(out), clock=clock), out


@pytest.mark.parametrize(
    ("seconds", "said"), [(42.4, "42 s"), (89, "89 s"), (125, "2 min"), (3600 * 2 + 300, "2 h 05 min")]
)
def test_durations(seconds, said):
    assert duration(seconds) == said


def test_a_file_gets_lines_now_and_then_with_the_time_left():
    clock = Seconds()
    display, out = shown_in_a_file(clock)
    with display, display.phase("warming up", 100, "steps", announced=True) as phase:
        for step in range(1, 101):
            clock.now += 1.0
            phase.update(step, f"loss {1 / step:.2f}")
    lines = out.getvalue().splitlines()
    assert lines[0] == "warming up" and lines[-1] == "warming up: done in 2 min"
    assert lines[1:-1] == [
        "warming up: 15 of 100 steps, about 85 s left  loss 0.07",
        "warming up: 45 of 100 steps, about 55 s left  loss 0.02",
        "warming up: 75 of 100 steps, about 25 s left  loss 0.01",
    ]


def test_a_short_phase_leaves_a_file_alone():
    clock = Seconds()
    display, out = shown_in_a_file(clock)
    with display, display.phase("step 1/4  rollouts") as phase:
        clock.now += 5
        phase.update(3, total=8)
    assert out.getvalue() == ""


def test_a_phase_that_fails_is_not_called_done():
    display, out = shown_in_a_file(Seconds())
    with pytest.raises(KeyError), display, display.phase("fetching", announced=True):
        raise KeyError
    assert out.getvalue() == "fetching\n"


def test_no_control_characters_and_no_wrapping_in_a_file(monkeypatch):
    """Whatever the environment says of colours and columns."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "20")
    out = io.StringIO()
    shown = console(out)
    table = Table("key", title="a table")
    table.add_row("word " * 60)
    with Display(console=shown) as display:
        display.say("[bold] is not markup " + "x" * 300)
        display.show(table)
    assert "\x1b" not in out.getvalue() and "\r" not in out.getvalue()
    assert "[bold] is not markup " + "x" * 300 + "\n" in out.getvalue()
    assert "word " * 59 + "word" in out.getvalue()


def test_a_terminal_gets_bars_with_the_time_left():
    clock, out = Seconds(), io.StringIO()
    display = Display(console=Console(file=out, force_terminal=True, width=120), clock=clock)
    with display, display.phase("step 2/4  rollouts", 8, "sequences") as phase:
        assert display.bars is not None
        display.bars.get_time = clock
        clock.now += 10
        phase.update(2, "512 tokens/s")
        display.bars.refresh()
    drawn = out.getvalue()
    assert (
        "step 2/4  rollouts" in drawn
        and "2/8 sequences" in drawn
        and "512 tokens/s" in drawn
        and "left" in drawn
    )


def test_ranks_but_the_first_show_nothing():
    out = io.StringIO()
    with (
        Display(active=False, console=console(out)) as display,
        display.phase("long", 3, announced=True) as phase,
    ):
        phase.update(1)
        display.say("hello")
    assert out.getvalue() == ""


def test_steps_are_counted_from_one_and_have_a_time_left(tmp_path, monkeypatch):
    clock = Seconds()
    display, out = shown_in_a_file(clock)
    with (
        display,
        Tracker(
            load_config(ROOT / "configs" / "tiny.yaml", ["tracking.tensorboard=true"]),
            tmp_path,
            True,
            display=display,
        ) as tracker,
    ):
        for step in range(4):
            with tracker.phase(step, "rollout") as phase:
                clock.now += 40
                phase.update(1, total=2)
            left = tracker.time_left(step)
            assert left == ("" if step == 3 else f"  about {duration(40 * (3 - step))} left")
        axis = []
        monkeypatch.setattr(tracker._board, "add_scalar", lambda name, value, step: axis.append(step))
        tracker.log(0, {"reward/mean": 1.0}, [])
    assert out.getvalue().startswith("step 1/4  rollouts: 1 of 2, about 40 s left\nstep 2/4")
    assert axis == [1]
    assert '"step": 0' in (tmp_path / "metrics.jsonl").read_text()
