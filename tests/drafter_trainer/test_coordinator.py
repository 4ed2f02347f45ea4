"""Training goes on while it costs the ranks that decode little: two ranks on one simulated machine."""

import math
import random
from dataclasses import replace

import pytest
from torch.distributed import HashStore

from paceline.drafter_trainer.coordinator import Coordinator
from paceline.rollout.strategy import PLAIN, StepFeedback, Strategy

UPDATE_SECONDS = 0.05  # of training, between two questions whether it must stop


class Machine:
    """A busy rank and an idle one, on a clock that runs only when one of them does something.

    Args:
        slowdown: By how much training slows decode steps.
        noise: Standard deviation of the logarithm of a step's time.
        limit: The recipe's limit.
    """

    def __init__(self, slowdown: float, noise: float = 0.05, limit: float = 0.15, store=None):
        self.now, self.slowdown, self.noise = 1000.0, slowdown, noise
        self.store = HashStore() if store is None else store
        self.busy, self.idle = (
            Coordinator(
                self.store, 2, clock=lambda: self.now, sleep=self._sleep, max_slowdown=limit, machine="here"
            )
            for _ in range(2)
        )
        self.random = random.Random(0)
        self.trained = 0.0
        self.feedback = StepFeedback(PLAIN, 4, 100, [], [], 4, 0.0, 0.0, 0.05)
        self._work_left = self._began = 0.0
        self._end = math.inf

    def step(self, number: int, tail: float, before: float = 0.0) -> None:
        """A step of the RL: both decode for ``before`` seconds, then one of them for ``tail`` more.

        What one trains and for how long its training is held back is seen at ``self``.
        """
        self.trained = 0.0
        self.busy.begin(number)
        self.idle.begin(number)
        self._work_left, self._began, self._end = self._next_work(), self.now, math.inf
        self._advance(before, slowdown=1.0)  # two that decode slow each other far more than training does
        self._end = self.now + tail
        self.idle.idle()
        with self.idle.training():
            while not self.idle.must_stop():
                self._advance(UPDATE_SECONDS, self.slowdown)
                self.trained += UPDATE_SECONDS
        self._advance(max(self._end - self.now, 0.0) + UPDATE_SECONDS, 0.0)

    def work(self) -> StepFeedback:
        """What the next decode step has to do; its seconds are those without a neighbour."""
        return self.feedback

    def _next_work(self) -> float:
        return self.work().total_seconds * math.exp(self.random.gauss(0, self.noise))

    def _sleep(self, seconds: float) -> None:
        self._advance(seconds, 0.0)

    def _advance(self, seconds: float, slowdown: float) -> None:
        """Lets the busy rank decode at the speed that its neighbour leaves it."""
        until, speed = self.now + seconds, 1 / (1 + slowdown)
        while self.now < min(until, self._end):
            left = self._work_left / speed
            took = min(left, until - self.now)
            self.now, self._work_left = self.now + took, self._work_left - took * speed
            if left <= took:
                feedback = replace(self.work(), total_seconds=self.now - self._began)
                self._work_left, self._began = self._next_work(), self.now
                self.busy.beat()
                self.busy.decoded(feedback)
            if self.now >= self._end:
                self.busy.idle()
        self.now = max(self.now, until)


def test_training_that_slows_a_neighbour_by_a_third_is_found_and_stops():
    machine = Machine(0.3)
    machine.step(0, tail=120, before=20)
    price = machine.idle.price
    assert machine.idle.held_back and machine.trained < 40
    assert price.slowdown == pytest.approx(0.3, abs=0.05) and price.std_error < 0.02
    machine.step(1, tail=60)
    assert machine.idle.held_back and machine.trained == 0


def test_training_that_slows_a_neighbour_by_3_percent_goes_on_and_soon_without_pauses():
    machine = Machine(0.03)
    machine.step(0, tail=120, before=20)
    assert not machine.idle.held_back
    assert machine.trained + machine.idle.paused_seconds == pytest.approx(120, abs=1)
    assert 7 < machine.idle.paused_seconds < 12
    machine.step(1, tail=60)
    assert machine.idle.paused_seconds == 0 and machine.trained == pytest.approx(60, abs=1)
    for rank in (machine.busy, machine.idle):  # the other one may be idle first in the next step
        assert rank.price.slowdown == pytest.approx(0.03, abs=0.03)


@pytest.mark.parametrize("seed", range(3))
def test_noise_does_not_stop_training(seed):
    """Steps that vary by a third, and a machine that is half as fast for a second now and then."""
    machine = Machine(0.05, noise=0.3)
    machine.random.seed(seed)
    steady = machine.work

    def burdened() -> StepFeedback:
        slow = 2 if random.Random(int(machine.now)).random() < 0.1 else 1
        return replace(steady(), total_seconds=steady().total_seconds * slow)

    machine.work = burdened
    for step in range(3):
        machine.step(step, tail=60)
        assert not machine.idle.held_back


def test_the_time_of_larger_batches_is_not_attributed_to_training():
    """Whenever the neighbour trains, the batch happens to be twice as large."""
    machine = Machine(0.0)

    def work() -> StepFeedback:
        paused = math.floor(machine.now) % 3 == 0
        return replace(machine.feedback, active=4 if paused else 8, total_seconds=0.05 if paused else 0.1)

    machine.work = work
    machine.step(0, tail=120)
    assert not machine.idle.held_back and machine.trained > 100


@pytest.mark.parametrize(
    "change", [{"drafted": [3, 1]}, {"context": 600}, {"strategy": Strategy("suffix", 3)}]
)
def test_other_strategies_longer_drafts_and_longer_contexts_are_other_work(change):
    machine = Machine(0.0)

    def work() -> StepFeedback:
        paused = math.floor(machine.now) % 3 == 0
        return machine.feedback if paused else replace(machine.feedback, total_seconds=0.1, **change)

    machine.work = work
    machine.step(0, tail=120)
    assert not machine.idle.held_back and machine.trained > 100


def test_a_few_seconds_of_a_step_are_not_enough_to_stop():
    """It adds up over steps."""
    machine = Machine(0.3)
    held_back = []
    for step in range(8):
        machine.step(step, tail=7)
        held_back.append(machine.idle.held_back)
    assert not any(held_back[:3]) and held_back[-1]


def test_training_returns_when_the_price_has_fallen():
    machine = Machine(0.3)
    for step in range(3):
        machine.step(step, tail=60)
    assert machine.idle.held_back
    machine.slowdown = 0.02
    held_back = []
    for step in range(3, 12):
        machine.step(step, tail=60)
        held_back.append(machine.idle.held_back)
    assert held_back == [True] * 5 + [False] * 4
    assert machine.idle.price.slowdown == pytest.approx(0.02, abs=0.03)


def test_a_price_that_stays_costs_a_probe_in_eight_steps():
    machine = Machine(0.3)
    trained = []
    for step in range(24):
        machine.step(step, tail=60)
        trained.append(machine.trained)
    assert all(seconds == 0 for step, seconds in enumerate(trained) if step % 8)
    assert all(10 < trained[step] < 40 for step in (0, 8, 16))


def test_a_limit_of_zero_stops_what_is_certain_to_cost():
    costly, free = Machine(0.05, noise=0.01, limit=0.0), Machine(0.0, noise=0.01, limit=0.0)
    for machine in (costly, free):
        machine.step(0, tail=120)
    assert costly.idle.held_back and not free.idle.held_back


def test_on_another_machine_nothing_is_measured_and_nothing_held_back():
    machine = Machine(0.3)
    machine.idle._machine = "elsewhere"
    for step in range(2):
        machine.step(step, tail=60)
        assert machine.trained == pytest.approx(60, abs=1) and machine.idle.paused_seconds == 0
    assert machine.idle.price.slowdown is None and machine.busy.price.slowdown is None


def test_a_price_does_not_hold_back_those_beside_whom_nobody_decodes():
    """The rank that still decodes is on another machine by now."""
    machine = Machine(0.3)
    machine.step(0, tail=60)
    assert machine.idle.held_back
    machine.busy._machine = "elsewhere"
    machine.step(1, tail=60)
    assert not machine.idle.held_back and machine.trained == pytest.approx(60, abs=1)


def test_a_result_counts_once_however_many_ranks_saw_the_pause():
    machine = Machine(0.3, noise=0.0)
    second = Coordinator(machine.store, 3, clock=lambda: machine.now, machine="here")
    machine.busy._world = machine.idle._world = 3
    second.begin(0)
    first = machine.busy.decoded
    machine.busy.decoded = lambda feedback: (first(feedback), second.decoded(feedback))
    machine.step(0, tail=13)
    # pauses in 1002 ... 1003, 1005 ... 1006, and 1008 ... 1009; the next has no second of training after it
    assert machine.store.add("0/here/results", 0) == 3


def test_looks_are_rare():
    """The store serves all ranks: it is not asked at every step of a fast model."""

    class Counted:
        def __init__(self):
            self.store, self.asked = HashStore(), 0

        def add(self, key, amount):
            self.asked += key.endswith("neighbours") and amount == 0
            return self.store.add(key, amount)

    machine = Machine(0.03, store=Counted())
    machine.feedback = replace(machine.feedback, total_seconds=0.002)
    machine.busy.begin(0)
    machine._end, machine._began = math.inf, machine.now
    machine._advance(20, 0.0)
    assert machine.store.asked <= 21
    machine.store.asked = 0
    machine.step(1, tail=20)
    assert machine.store.asked <= 10 * 20 + 21


def test_a_lost_store_ends_training_as_ever():
    class Failing:
        def __init__(self):
            self.store, self.gone = HashStore(), False

        def add(self, key, amount):
            if self.gone:
                raise RuntimeError("Broken pipe")
            return self.store.add(key, amount)

    machine = Machine(0.03, store=Failing())
    steady, lost_at = machine.work, machine.now + 10

    def work() -> StepFeedback:
        machine.store.gone = machine.now > lost_at
        return steady()

    machine.work = work
    machine.step(0, tail=60)
    assert 5 < machine.trained < 11 and not machine.idle.held_back
    for rank in (machine.busy, machine.idle):
        assert "Broken pipe" in rank.take_problem()
    machine.step(1, tail=60)
    assert machine.trained == 0 and machine.idle.take_problem() is None
    assert machine.busy._comparison._unplaced == []  # no steps are kept for nobody


def test_a_rank_alone_measures_nothing():
    alone = Coordinator(None, 1, sleep=pytest.fail)
    alone.begin(0)
    alone.decoded(StepFeedback(PLAIN, 4, 100, [], [], 4, 0.0, 0.0, 0.05))
    alone.idle()
    with alone.training():
        assert alone.must_stop()
    assert alone.price.slowdown is None and not alone.held_back
