"""Trials cost at most the allowance, become rarer while nothing changes, and come back when it does."""

import pytest

from paceline.rollout.strategy import PLAIN, Strategy
from paceline.rollout.strategy.exploration import Allowance, ExpectedLoss, Trials
from tests.rollout.strategy.test_bandit import World, best_fixed, play, selector_for

ARM = Strategy("eagle3", 2)


def candidates(allowance, trials, loss=0.1, hopeful=True, catching_up=0.0):
    losses = {ARM: ExpectedLoss(loss, catching_up)}
    return allowance.candidates(trials, PLAIN, 1.0, losses, {ARM} if hopeful else set())


def begin(allowance, trials, loss=0.1, catching_up=0.0):
    trials.begin(ARM, 4)
    allowance.charge(trials, ARM, ExpectedLoss(loss, catching_up), 4, best_rate=2.0)


def spend(allowance, trials, seconds):
    allowance.seconds += seconds
    trials.seconds += seconds


def test_a_trial_waits_for_its_allowance_and_each_next_one_twice_as_long():
    allowance, trials = Allowance(0.02), Trials()
    assert candidates(allowance, trials) == []
    gaps = []
    for _ in range(4):
        waited = 0
        while not candidates(allowance, trials):
            spend(allowance, trials, 1.0)
            waited += 1
        begin(allowance, trials)
        gaps.append(waited)
    assert gaps[0] == pytest.approx(5, abs=1)  # 0.1 s at 2 % of the time
    assert gaps[1:] == pytest.approx([5, 10, 20], abs=1)
    assert allowance.lost <= 0.02 * allowance.seconds


def test_trials_of_all_buckets_share_one_allowance():
    allowance, large, small = Allowance(0.02), Trials(), Trials()
    spend(allowance, large, 5.0)
    assert candidates(allowance, small) == [ARM]  # which took no time yet
    begin(allowance, small)
    assert candidates(allowance, large) == []


def test_a_trial_is_charged_with_what_it_has_lost():
    """The best arm would have had 1.5 tokens in 0.75 s."""
    allowance, trials = Allowance(0.02), Trials()
    begin(allowance, trials, loss=0.1)
    assert allowance.lost == pytest.approx(0.1)
    for seconds, lost in ((0.95, 0.275), (0.95, 0.45), (0.65, 0.325), (0.75, 0.3), (9.0, 0.3)):
        allowance.settle(trials, 1.5, seconds)
        assert allowance.lost == pytest.approx(lost)


def test_steps_that_a_trial_did_not_run_lose_nothing():
    allowance, trials = Allowance(0.02), Trials()
    begin(allowance, trials)
    allowance.settle(trials, 1.0, 0.6)
    allowance.stop(trials)
    assert trials.left == 0
    assert allowance.lost == pytest.approx(0.1)  # the measured loss of the one step that it ran
    allowance.settle(trials, 1.0, 0.9)
    assert allowance.lost == pytest.approx(0.1)


def test_an_arm_that_nothing_speaks_for_is_checked_later():
    allowance, trials = Allowance(0.02), Trials()
    spend(allowance, trials, 1000.0)
    assert candidates(allowance, trials, hopeful=False) == []
    spend(allowance, trials, 5.1)
    assert candidates(allowance, trials, hopeful=False) == [ARM]


def test_a_hopeful_trial_loses_at_most_a_third():
    allowance, trials = Allowance(0.02), Trials()
    spend(allowance, trials, 1000.0)
    assert candidates(allowance, trials, loss=0.33) == [ARM]
    assert candidates(allowance, trials, loss=0.34) == []


def test_a_drafter_that_has_to_catch_up_waits_for_its_allowance_however_hopeful():
    allowance, trials = Allowance(0.02), Trials()
    spend(allowance, trials, 50.0)
    assert candidates(allowance, trials, catching_up=0.8) == [ARM]
    assert candidates(allowance, trials, catching_up=1.0) == []
    begin(allowance, trials, catching_up=0.8)
    spend(allowance, trials, 44.0)
    assert candidates(allowance, trials) == []
    spend(allowance, trials, 2.0)
    assert candidates(allowance, trials) == [ARM]


def test_a_changed_time_of_the_best_arm_ends_all_waits():
    allowance, trials = Allowance(0.02), Trials()
    spend(allowance, trials, 1000.0)
    begin(allowance, trials, loss=0.3)
    assert allowance.changed(trials, PLAIN, 1.0) == allowance.changed(trials, PLAIN, 1.2) == 1.0
    assert candidates(allowance, trials) == []
    assert allowance.changed(trials, PLAIN, 1.5) == pytest.approx(1.5)
    assert candidates(allowance, trials) == [ARM]


def test_new_weights_of_a_drafter_end_the_waits_of_its_arms():
    trials, other = Trials(), Strategy("suffix", 2)
    allowance = Allowance(0.02)
    for arm in (ARM, other):
        allowance.charge(trials, arm, ExpectedLoss(0.1, 0.0), 4, best_rate=2.0)
    trials.forget("eagle3")
    assert list(trials.waits) == [other]


def test_the_engine_loses_less_while_nothing_changes():
    """Calibrated, with 22 arms, after 1,000 steps."""
    for batch, accept in ((16, {"suffix": 0.1, "eagle3": 0.2}), (4, {"suffix": 0.3, "eagle3": 0.7})):
        shares = []
        for seed in range(3):
            world = World(accept, seed=seed)
            selector = selector_for(world, seed=seed)
            play(selector, world, batch, 1000)
            shares.append(play(selector, world, batch, 1000) / best_fixed(selector, world, batch))
        assert sum(shares) / len(shares) > 0.985
