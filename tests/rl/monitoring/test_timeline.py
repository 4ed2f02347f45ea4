"""Times of a step's phases come from a clock that nobody sets."""

import time
from contextlib import nullcontext

from accelerate import Accelerator

from paceline.rl.monitoring import timeline
from paceline.rl.monitoring.timeline import Clock


def test_a_jump_of_the_wall_clock_is_not_seen(monkeypatch):
    wall = iter([0.0, 9e9, -9e9, 1.0])
    monkeypatch.setattr(time, "time", lambda: next(wall, 0.0))
    made = Clock(Accelerator(cpu=True), nullcontext)
    with made.phase("rollout"):
        pass
    (span,) = made.spans
    assert 0 <= span.begin <= span.end < 5
    assert 0 <= made.since(time.monotonic()) < 5


def test_another_machines_step_begins_when_it_hears_of_it(monkeypatch):
    """Monotonic clocks of two machines have nothing in common."""

    def told(values):
        values[:] = [9e9, "another kernel"]

    monkeypatch.setattr(timeline, "broadcast_object_list", told)
    assert 0 <= Clock(Accelerator(cpu=True), nullcontext).since(time.monotonic()) < 5
