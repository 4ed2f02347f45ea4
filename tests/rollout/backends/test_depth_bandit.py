"""How deep drafts are at each batch size, for decoders whose steps cannot be timed apart beforehand."""

import random

from paceline.rollout.backends.depth_bandit import DepthBandit

DEPTHS = (0, 2, 4)


def simulate(bandit, batch, steps, seconds_of, tokens_of, seed=0):
    """Runs steps of one batch size; a step verifies what the step before it drafted. Returns the depths that
    were chosen.
    """
    noise, drafted, chosen = random.Random(seed), 0, []
    for _ in range(steps):
        depth = bandit.choose(batch)
        chosen.append(depth)
        tokens = sum(1 + (noise.random() < 0.9) * tokens_of(drafted) for _ in range(batch))
        bandit.record(batch, drafted, tokens, seconds_of(batch, drafted) * noise.uniform(0.95, 1.05))
        drafted = depth
    return chosen


def test_the_tail_speculates_and_the_bulk_does_not():
    """Verification is free for one sequence and dear for many: the best depth differs, and is found for
    each."""
    bandit = DepthBandit(DEPTHS, seed=1)

    def seconds(batch, depth):
        return 1.0 + 0.03 * batch * depth

    def tokens(depth):
        return depth * 0.5

    small = simulate(bandit, 1, 400, seconds, tokens)
    large = simulate(bandit, 32, 400, seconds, tokens)
    assert small[200:].count(4) > 0.8 * 200
    assert large[200:].count(0) > 0.8 * 200
    assert set(small[:16]) == set(DEPTHS)  # every one was tried
    assert bandit.schedule() == [(1, 1, 4), (2, 32, 0)]


def test_a_depth_that_turns_bad_is_left():
    bandit = DepthBandit(DEPTHS, seed=2)
    simulate(bandit, 2, 300, lambda batch, depth: 1.0, lambda depth: depth)
    late = simulate(bandit, 2, 600, lambda batch, depth: 1.0 + depth, lambda depth: 0)
    assert late[300:].count(0) > 0.8 * 300


def test_a_new_drafter_makes_old_numbers_light():
    bandit = DepthBandit(DEPTHS, seed=3)
    simulate(bandit, 2, 300, lambda batch, depth: 1.0 + depth, lambda depth: 0)
    bandit.drafter_changed()
    late = simulate(bandit, 2, 600, lambda batch, depth: 1.0, lambda depth: depth, seed=4)
    assert late[400:].count(4) > 0.8 * 200
