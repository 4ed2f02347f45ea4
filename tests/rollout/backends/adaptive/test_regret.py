"""What the choice of depths loses against the best static depth of each batch size, in simulated decoders.

The times of a step are those of vLLM on two cores (``CPU``), where drafts lose from 16 sequences on, and of a
machine on which verification is nearly free (``FREE``). Losses are expected values, so that luck is no skill.
"""

import itertools
import random

import pytest

from paceline.rollout.backends.adaptive.depth_control import DepthControl, StepShape

LEVELS = (0.72, 0.5, 0.45, 0.42, 0.4, 0.4, 0.4)  # acceptance of each level, given the one above
DEPTHS = (0, 1, 2, 3, 4, 7)


def cpu(batch, verified, drafted):
    return 0.001 * (25 + 3.2 * batch * (1 + verified) + 0.2 * batch + (5 + 0.4 * batch) * drafted)


def free(batch, verified, drafted):
    return 0.001 * (20 + 0.1 * batch * (1 + verified) + max(drafted, 0.5))


def tokens(depth):
    """Expected tokens of a sequence with a draft of that depth."""
    return 1 + sum(itertools.accumulate(LEVELS[:depth], lambda a, b: a * b))


class Decoder:
    """A pipeline as vLLM's, with times that vary by 5 % and drift as much, and a hiccup once in 300 steps."""

    def __init__(self, seconds, depths=DEPTHS, seed=0):
        self.control = DepthControl("eagle3", depths, seed=seed, say=lambda line: None)
        self.seconds, self.depths, self.random = seconds, depths, random.Random(seed)
        self.now = self.drift = 0.0
        self.drafted = self.number = 0
        self.depths_run = []
        self.lost = self.spent = 0.0

    def best(self, batch):
        return max(batch * tokens(depth) / self.seconds(batch, depth, depth) for depth in self.depths)

    def step(self, batch, prompt_tokens=0):
        self.number, verified = self.number + 1, self.drafted
        shape = StepShape(batch, [verified] * batch, 100, prompt_tokens)
        self.drafted = self.control.scheduled(self.number, shape, self.now)
        expected = self.seconds(batch, verified, self.drafted)
        self.drift = 0.98 * self.drift + self.random.gauss(0, 0.01)
        noise = 1 + self.drift + self.random.gauss(0, 0.05)
        self.now += expected * max(noise, 0.5) * (5 if self.random.random() < 1 / 300 else 1)
        self.control.finished(
            self.number, [1 + self.accepted(verified) for _ in range(batch)], self.now, True
        )
        self.depths_run.append(self.drafted)
        self.spent += expected
        self.lost += expected - batch * tokens(verified) / self.best(batch)
        return tokens(verified)

    def accepted(self, depth):
        return sum(1 for _ in itertools.takewhile(lambda p: self.random.random() < p, LEVELS[:depth]))

    def regret(self, batch, steps):
        """Runs steps of a batch size and returns the share of their time that was lost."""
        self.lost = self.spent = 0.0
        for _ in range(steps):
            self.step(batch)
        return self.lost / self.spent

    def regret_of_batch(self, lengths):
        """Decodes sequences of given lengths, all at once until the last one ends."""
        self.lost = self.spent = done = 0.0
        left = list(lengths)
        while left:
            done += self.step(len(left))
            left = [length for length in left if length > done]
        return self.lost / self.spent


def mean(values):
    values = list(values)
    return sum(values) / len(values)


@pytest.mark.parametrize("batch", [4, 16, 64])
def test_where_drafts_lose_steps_stop_drafting(batch):
    """The first measurements tell, and checks become rare: the share of the time that is lost shrinks."""
    first, second, later = [], [], []
    for seed in range(4):
        decoder = Decoder(cpu, seed=seed)
        first.append(decoder.regret(batch, 100))
        second.append(decoder.regret(batch, 900))
        later.append(decoder.regret(batch, 3000))
    assert mean(first) < 0.07
    assert mean(second) < 0.02
    assert mean(later) < 0.01


def test_where_drafts_pay_the_best_depth_is_kept():
    for seed in range(4):
        decoder = Decoder(free, depths=(0, 1, 3), seed=seed)
        assert decoder.regret(4, 100) < 0.06
        assert decoder.regret(4, 3000) < 0.01
        assert decoder.depths_run[-1000:].count(3) > 980


@pytest.mark.parametrize("seconds", [cpu, free])
def test_grpo_batches_teach_each_other(seconds):
    """64 sequences whose lengths are log-normal, decoded together; each size of the batch is reached for the
    first time in the first batch, and lasts for a few steps.
    """
    first, later = [], []
    for seed in range(3):
        decoder, lengths = Decoder(seconds, seed=seed), random.Random(seed)
        regrets = [
            decoder.regret_of_batch([min(1024.0, lengths.lognormvariate(4, 1)) for _ in range(64)])
            for _ in range(6)
        ]
        first.append(regrets[0])
        later += regrets[1:]
    assert mean(first) < 0.1
    assert mean(later) < 0.04


def test_a_smaller_batch_begins_with_what_a_larger_one_taught():
    """Depths 1 and 2 lose a little at 24 sequences and may pay at 16; the others are known to be too dear."""
    for seed in range(4):
        decoder = Decoder(cpu, seed=seed)
        decoder.regret(24, 500)
        assert decoder.regret(16, 60) < 0.06
        assert max(decoder.depths_run[-60:]) <= 2


@pytest.mark.parametrize("warm", [500, 4000])
def test_load_that_changes_the_times_changes_the_depth(warm):
    """Drafts become cheap, first with plain decoding, then alone; and dear again."""

    def cheap(batch, verified, drafted):
        return 1.1 * cpu(batch, 0, 0) + 0.0005 * verified

    for seconds in (free, cheap):
        regrets = []
        for seed in range(4):
            decoder = Decoder(cpu, depths=(0, 1, 3), seed=seed)
            decoder.regret(16, warm)
            decoder.seconds = seconds
            decoder.regret(16, 1500)
            regrets.append(decoder.regret(16, 300))
            decoder.seconds = cpu
            decoder.regret(16, 200)
            assert decoder.regret(16, 300) < 0.05
        assert sorted(regrets)[2] < 0.05


def test_no_trial_begins_in_a_step_that_reads_prompts():
    """Its time teaches nothing, and drafts make it longer."""
    decoder = Decoder(cpu)
    decoder.regret(16, 300)
    choose, begun = decoder.control.selector.choose, []
    decoder.control.selector.choose = lambda *sizes, explore: begun.append(explore) or choose(*sizes, explore)
    for _ in range(2000):
        decoder.step(16, prompt_tokens=60)
    assert not any(begun)
    assert set(decoder.depths_run[-1990:]) == {0}
