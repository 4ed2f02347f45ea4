"""A pause is compared with the training around it, in steps of equal work and nothing else."""

import math

import pytest

from paceline.drafter_trainer.slowdown.neighbours import Neighbours
from paceline.drafter_trainer.slowdown.pause_comparison import PauseComparison

ONE = (1, 1)  # ranks that are busy and in training


class Rank:
    """A busy rank: makes steps of given times and looks after each of them."""

    def __init__(self):
        self.comparison, self.now, self.changes, self.found = PauseComparison(span=1.0), 0.0, 0, []

    def decode(self, paused, times, work="w", ranks=ONE, extra=0):
        """Steps of these seconds, after one change and while nothing else changes."""
        self.changes += 1
        self.look(Neighbours(*ranks, paused, self.changes))
        for seconds in times:
            self.now += seconds
            self.comparison.add(self.now, work, seconds)
            self.look(Neighbours(*ranks, paused, self.changes))

    def look(self, neighbours):
        result = self.comparison.look(self.now, neighbours)
        if result is not None:
            self.found.append(result)


def test_the_ratio_by_hand_with_the_median_of_each_side():
    """0.14 before and 0.10 after, against 0.10: half the logarithm of 1.4. One step took a second, for
    reasons of its own.
    """
    rank = Rank()
    rank.decode(0, [0.14] * 12)
    rank.decode(1, [0.1] * 4 + [1.0] + [0.1] * 6)
    assert rank.found == []
    rank.decode(0, [0.1] * 30)
    assert [log_ratio for _, log_ratio in rank.found] == [pytest.approx(math.log(1.4) / 2)]
    assert rank.found[0].pause == 2  # the second change of the step


def test_what_drifts_is_not_attributed_to_training():
    """Steps get longer by a fifth from each second to the next, whoever trains."""
    rank = Rank()
    for number, paused in enumerate((0, 1, 0)):
        rank.decode(paused, [0.04 * 1.01 ** (20 * number + step) for step in range(20)])
    assert [result.log_ratio for result in rank.found] == [pytest.approx(0, abs=0.02)]


def test_only_equal_work_is_compared():
    """In the pause the batch has become smaller: there is nothing to compare. With two kinds of work, the one
    that is on all sides counts.
    """
    rank = Rank()
    rank.decode(0, [0.2] * 8, work="eight sequences")
    rank.decode(1, [0.1] * 10, work="four sequences")
    rank.decode(0, [0.2] * 8, work="eight sequences")
    assert rank.found == []
    rank.decode(1, [0.2, 0.1] * 4, work="four sequences")
    rank.comparison.add(rank.now, "eight sequences", 0.1)
    rank.look(Neighbours(*ONE, 1, rank.changes))
    rank.decode(0, [0.2] * 8, work="eight sequences")
    assert [result.log_ratio for result in rank.found] == [pytest.approx(math.log(2))]


def test_steps_during_which_something_changed_are_dropped():
    """Between the last look before a change and the first one after it there may be many, of either kind."""
    rank = Rank()
    for paused, dropped, kept, count in ((0, 0.01, 0.13, 5), (1, 0.04, 0.1, 5), (0, 0.02, 0.13, 8)):
        for _ in range(20):
            rank.now += dropped
            rank.comparison.add(rank.now, "w", dropped)
        rank.decode(paused, [kept] * count)
    assert [result.log_ratio for result in rank.found] == [pytest.approx(math.log(1.3))]


def test_a_pause_between_two_looks_is_noticed():
    rank = Rank()
    rank.decode(0, [0.13] * 9)
    rank.decode(1, [0.1] * 9)
    rank.comparison.add(rank.now + 2, "w", 99.0)
    rank.now += 2
    rank.look(Neighbours(*ONE, 1, rank.changes + 2))  # there and back: the step between is of neither kind
    rank.decode(0, [0.13] * 9)
    assert [result.log_ratio for result in rank.found] == []  # two windows of the pause, no training between


def test_training_that_has_ended_or_not_begun_is_no_pause():
    """Then other ranks may be decoding, which costs too."""
    rank = Rank()
    rank.decode(0, [0.13] * 9)
    rank.decode(0, [0.1] * 10, ranks=(1, 0))
    rank.decode(0, [0.13] * 9)
    assert rank.found == []


@pytest.mark.parametrize("other", [(2, 1), (1, 2)])
def test_the_same_ranks_are_busy_and_in_training_before_during_and_after(other):
    rank = Rank()
    rank.decode(0, [0.13] * 9, ranks=other)
    rank.decode(1, [0.1] * 10)
    rank.decode(0, [0.13] * 9)
    assert rank.found == []
    rank.decode(1, [0.1] * 10)
    rank.decode(0, [0.13] * 9)
    assert len(rank.found) == 1


def test_where_only_some_pause_nothing_is_compared():
    rank = Rank()
    for paused in (0, 1, 0):
        rank.decode(paused, [0.1 + 0.03 * (paused == 0)] * 10, ranks=(1, 2))
    assert rank.found == []
    for paused in (0, 1, 2, 1, 0):  # one after the other begins and ends its pause
        rank.decode(paused, [0.1 if paused == 2 else 0.13 if paused == 0 else 0.5] * 10, ranks=(1, 2))
    assert [result.log_ratio for result in rank.found] == [pytest.approx(math.log(1.3))]


def test_only_the_last_second_before_a_pause_counts():
    rank = Rank()
    rank.decode(0, [0.5] * 100 + [0.13] * 8)
    rank.decode(1, [0.1] * 10)
    rank.decode(0, [0.13] * 9)
    assert [result.log_ratio for result in rank.found] == [pytest.approx(math.log(1.3))]
