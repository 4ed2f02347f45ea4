"""What pauses have found decides: never a few of them, never for good, and no more pauses than it takes."""

import math

import pytest

from paceline.drafter_trainer.slowdown.training_price import TrainingPrice

BEGAN = -100.0


def price_of(*ratios, limit=0.15, step=0) -> TrainingPrice:
    price = TrainingPrice(limit)
    price.begin(step)
    for ratio in ratios:
        price.add(math.log(ratio))
    return price


def pauses(price, seconds=48) -> int:
    """How many of these seconds are pauses, where each is asked in its middle."""
    return sum(price.pause_due(second + 0.5, BEGAN) for second in range(seconds))


def test_the_mean_and_its_error_by_hand():
    """The logarithms 0 and 0.2: mean 0.1, sample standard deviation 0.2 / √2, over √2 is 0.1."""
    price = price_of(1.0, math.exp(0.2))
    assert price.slowdown == pytest.approx(math.exp(0.1) - 1)
    assert price.std_error == pytest.approx(math.exp(0.1) * 0.1)
    assert price_of(1.3).slowdown is None and price_of(1.3).std_error == math.inf


def test_few_pauses_never_stop_training_however_equal_they_are():
    price = price_of(*[3.0] * 7)
    assert not price.too_high
    price.add(math.log(3.0))
    assert price.too_high


def test_two_standard_errors_are_needed():
    """Between 1.0 and 1.5 it is 22 % on average; that is above 15 %, but by less than two standard errors of
    9.4 %.
    """
    price = price_of(*[1.0, 1.5] * 4)
    assert price.slowdown == pytest.approx(0.2247, abs=1e-4) and price.std_error == pytest.approx(
        0.0938, abs=1e-4
    )
    assert not price.too_high
    assert price_of(*[1.0, 1.5] * 4, limit=0.03).too_high
    assert price_of(*[1.0, 1.5] * 40).too_high  # the same, known better


def test_training_costs_at_most_half_of_what_good_drafts_would_save():
    price = price_of(*[1.05, 1.06] * 4)
    assert not price.too_high
    price.begin(1, most_saved=0.13)
    assert not price.too_high
    price.begin(1, most_saved=0.1)
    assert price.too_high
    price.begin(1, most_saved=1.0)
    assert not price.too_high, "the recipe's limit is higher"
    assert price_of(*[1.2, 1.21] * 4).too_high


def test_where_drafts_save_little_training_stops_before_its_price_is_known():
    price = price_of()
    price.begin(1, most_saved=0.09)
    assert price.too_high
    price.begin(2, most_saved=0.1)
    assert not price.too_high


def test_it_is_forgotten_after_eight_steps():
    price = price_of(*[1.3] * 8, step=3)
    price.begin(10)
    assert price.too_high
    price.begin(11)
    assert price.slowdown is None and not price.too_high


def test_no_more_pauses_than_it_takes():
    """Every third second while it is unknown, every eighth while it is in doubt, else none."""
    assert pauses(price_of()) == pauses(price_of(*[1.3] * 7)) == 16
    assert pauses(price_of(*[1.0, 1.5] * 4, limit=0.2)) == 6
    assert pauses(price_of(*[1.02, 1.03] * 4)) == 0
    assert pauses(price_of(*[1.3, 1.31] * 4)) == 0  # training has stopped


def test_a_pause_comes_after_a_second_of_training():
    """Otherwise there would be nothing to compare it with."""
    price = price_of()
    assert price.pause_due(3.5, since=2.0) and not price.pause_due(3.5, since=2.1)


def test_pauses_in_vain_end_until_one_has_a_result_or_eight_steps_have_passed():
    price = price_of()
    for _ in range(4):
        assert pauses(price)
        price.paused()
    assert not pauses(price)
    price.add(0.1)
    assert pauses(price)
    for _ in range(4):
        price.paused()
    price.begin(7)
    assert not pauses(price)
    price.begin(8)
    assert pauses(price)
