"""The best depth is found from times, for each batch size and with steps in flight.

A dead drafter is switched off.
"""

import itertools
import json
import random
from collections import deque

import pytest

from paceline.rollout.backends.adaptive.depth_control import DepthControl, StepShape
from paceline.rollout.backends.adaptive.draft_schedule import draft_depths, listing_schedule
from paceline.rollout.backends.adaptive.draft_watchdog import DraftWatchdog
from paceline.rollout.strategy import Strategy

DEPTHS = (0, 1, 2, 4)


class Decoder:
    """A pipeline as vLLM's: a step verifies what the step before it drafted; ``in_flight`` steps are
    scheduled before the first one's result is known.
    """

    def __init__(self, control, *, seconds, accept, in_flight=1, seed=0):
        self.control, self.seconds, self.accept = control, seconds, accept
        self.random, self.in_flight = random.Random(seed), in_flight
        self.now, self.drafted, self.number = 0.0, 0, 0
        self.queue = deque()
        self.chosen = []

    def levels(self, depth):
        levels = 0
        while levels < depth and self.random.random() < self.accept:
            levels += 1
        return levels

    def run(self, batch, steps, context=100, **shape):
        """Runs steps of a batch size, or of what ``batch()`` returns; returns the depths that were chosen."""
        chosen = []
        for _ in range(steps):
            size = batch() if callable(batch) else batch
            verified, self.number = self.drafted, self.number + 1
            shaped = StepShape(size, [verified] * size, context, **shape)
            self.drafted = self.control.scheduled(self.number, shaped, self.now)
            self.queue.append((self.number, size, verified, self.drafted))
            chosen.append(self.drafted)
            if len(self.queue) == self.in_flight:
                self.finish()
        return chosen

    def finish(self):
        number, size, verified, drafts = self.queue.popleft()
        self.now += self.seconds(size, verified, drafts) * self.random.uniform(0.95, 1.05)
        committed = [1 + self.levels(verified) for _ in range(size)]
        self.control.finished(number, committed, self.now, busy=True)
        last = self.control.last
        assert (last.strategy.depth, list(last.drafted)) == (verified, [verified] * size)


def seconds(batch, verified, drafted):
    """Verification is free for one sequence and dear for many."""
    return 0.01 * (1 + 0.03 * batch * verified + 0.02 * drafted)


def control(say=lambda line: None, **options):
    return DepthControl("eagle3", DEPTHS, say=say, **options)


@pytest.mark.parametrize("in_flight", [1, 2])
def test_the_tail_speculates_and_the_bulk_does_not(in_flight):
    for seed in range(5):
        chooses = control(seed=seed)
        decoder = Decoder(chooses, seconds=seconds, accept=0.7, in_flight=in_flight, seed=seed)
        large = decoder.run(32, 500)
        small = decoder.run(1, 500)
        assert large[250:].count(0) > 0.8 * 250
        assert sum(depth >= 2 for depth in small[250:]) > 0.7 * 250
        assert small[250:].count(4) > small[250:].count(1)
        (_, one, few), (two, many, none) = chooses.schedule()
        assert (one, two, many, none) == (1, 2, 32, 0)
        assert few >= 2


@pytest.mark.parametrize("in_flight", [1, 2])
def test_a_step_takes_the_time_between_two_results(in_flight):
    """The next one was scheduled before the last result, or just after it."""
    chooses = control()
    decoder = Decoder(chooses, seconds=lambda *shape: 0.01, accept=0.5, in_flight=in_flight)
    decoder.run(4, 50)
    assert 0.0095 <= chooses.last.total_seconds <= 0.0105
    decoder.now += 3600  # nothing to decode for an hour
    chooses.finished(-1, [], decoder.now - 3600, busy=False)
    while decoder.queue:
        decoder.finish()
    decoder.run(4, in_flight)
    assert chooses.last.total_seconds <= 0.0105
    decoder.queue.clear()  # aborted, which nobody tells
    decoder.now += 3600
    decoder.run(4, in_flight)
    assert chooses.last.total_seconds <= 0.0105


@pytest.mark.parametrize("in_flight", [1, 2])
def test_the_time_of_a_step_belongs_to_the_depth_that_it_verified(in_flight):
    """With a delay, times would be learned for the wrong depth: here only one depth is fast."""
    chooses = control()

    def only_two_is_fast(batch, verified, drafted):
        return 0.01 if verified == 2 else 0.03

    decoder = Decoder(chooses, seconds=only_two_is_fast, accept=0.5, in_flight=in_flight)
    assert decoder.run(4, 400)[200:].count(2) > 0.8 * 200


def test_contexts_are_learned_apart():
    chooses = control()
    decoder = Decoder(chooses, seconds=lambda b, verified, d: 0.01, accept=0.8)
    assert decoder.run(1, 300)[200:].count(4) > 80
    decoder.seconds = lambda b, verified, d: 0.01 * (1 + 2 * verified)
    assert decoder.run(1, 300, context=5000)[200:].count(0) > 80
    decoder.seconds = lambda b, verified, d: 0.01
    assert decoder.run(1, 50)[10:].count(4) > 30


def test_batch_sizes_that_alternate_still_teach():
    """32 and 33 sequences are in two buckets; if each had its way, all steps would verify another depth than
    they draft.
    """
    chooses = control()

    def dear_above_32(batch, verified, drafted):
        return 0.01 * (1 + (verified if batch > 32 else 0))

    decoder = Decoder(chooses, seconds=dear_above_32, accept=0.8)
    decoder.run(32, 200)
    decoder.run(33, 200)
    sizes = iter(range(10**6))
    depths = decoder.run(lambda: 32 + next(sizes) % 2, 400)
    assert sum(a != b for a, b in itertools.pairwise(depths[200:])) < 40


def test_a_depth_that_turns_bad_is_left():
    chooses = control(seed=2)
    decoder = Decoder(chooses, seconds=lambda b, verified, d: 0.01, accept=0.9)
    decoder.run(2, 300)
    decoder.seconds, decoder.accept = lambda b, verified, d: 0.01 * (1 + verified), 0.2
    assert decoder.run(2, 600)[300:].count(0) > 0.8 * 300


def test_steps_that_read_prompts_or_mix_depths_teach_nothing():
    chooses = control()
    decoder = Decoder(chooses, seconds=seconds, accept=0.7)
    decoder.run(4, 100, prompt_tokens=1000)
    for number in range(100):
        chooses.scheduled(-number - 1, StepShape(4, [0, 1, 2, 4], 100), decoder.now)
        chooses.finished(-number - 1, [1] * 4, decoder.now + 1, busy=True)
    assert chooses.state()["selector"]["windows"] == []


def test_a_pause_and_a_hiccup_are_no_times_of_a_step():
    chooses = control()
    decoder = Decoder(chooses, seconds=seconds, accept=0.7)
    decoder.run(1, 300)
    chooses.interrupted()
    decoder.now += 3600
    decoder.run(1, 1)
    assert chooses.last.total_seconds < 0.02
    decoder.seconds = lambda *shape: 100.0  # one step's
    decoder.run(1, 1)
    decoder.seconds = seconds
    assert chooses.last.total_seconds < 1
    assert sum(depth >= 2 for depth in decoder.run(1, 100)) > 60


def test_state_round_trips_through_json_and_is_refused_by_another_method():
    chooses = control()
    Decoder(chooses, seconds=seconds, accept=0.7).run(32, 300)
    saved = json.loads(json.dumps(chooses.state()))
    restored = control()
    restored.load_state(saved)
    assert restored.schedule() == chooses.schedule() == [(1, 32, 0)]
    assert Decoder(restored, seconds=seconds, accept=0.7).run(32, 10) == [0] * 10  # nothing is tried anew
    with pytest.raises(ValueError, match="learned with eagle3"):
        DepthControl("ngram", DEPTHS).load_state(saved)
    with pytest.raises(ValueError, match="depths"):
        DepthControl("eagle3", (0, 3)).load_state(saved)


@pytest.mark.parametrize("in_flight", [1, 2])
def test_a_dead_drafter_is_switched_off_and_on_again_when_a_probe_succeeds(in_flight):
    said = []
    chooses = control(said.append, probe_seconds=10)
    decoder = Decoder(chooses, seconds=lambda *shape: 5 * seconds(*shape), accept=0.8, in_flight=in_flight)
    decoder.run(8, 200)
    assert not said and chooses.status()["speculation_on"]
    decoder.accept = 0.0
    decoder.run(8, 100)  # the bandit alone would soon stop drafting, and never know
    assert not chooses.watchdog.speculates
    assert len(said) == 1 and "drafts is 1.0" in said[0] and "\n" not in said[0]
    assert chooses.status()["watchdog_trips"]["dead"] == 1
    off = decoder.run(8, int(300 / 0.05))  # five minutes
    assert 1 - off.count(0) / len(off) < 0.01  # probes cost little
    assert len(said) == 1
    decoder.accept = 0.8
    decoder.run(8, int(170 / 0.05))  # the longest pause
    assert chooses.status()["speculation_on"] and len(said) == 2 and "on again" in said[1]
    assert decoder.run(2, 300)[150:].count(0) < 30


def test_new_weights_are_probed_at_once():
    said = []
    chooses = control(said.append)
    decoder = Decoder(chooses, seconds=seconds, accept=0.0)
    decoder.run(8, 100)
    assert not chooses.watchdog.speculates
    assert decoder.run(8, 20) == [0] * 20
    decoder.accept = 0.8
    chooses.policy_changed()
    assert decoder.run(8, 20)[:8] == [1] * 8
    assert chooses.watchdog.speculates


def test_drafts_slower_than_plain_decoding_are_reported_once_with_numbers():
    said = []
    chooses = control(said.append)
    decoder = Decoder(chooses, seconds=lambda b, verified, d: 0.01 * (1 + 0.7 * verified), accept=0.5)
    decoder.run(16, 1500)
    assert len(said) == 1 and "without drafts" in said[0]
    assert "1600" in said[0] or "159" in said[0] or "160" in said[0]  # 16 sequences, 10 ms
    assert chooses.status()["watchdog_trips"] == {"dead": 0, "slow": 1}
    decoder.seconds = lambda b, verified, d: 0.01
    chooses.drafter_changed()
    decoder.run(16, 3000)
    assert len(said) == 2 and "pay again" in said[1]


def test_a_broken_control_never_raises_and_says_so_once():
    said = []
    chooses = control(said.append)
    assert chooses.schedule() == []
    chooses.selector.choose = None
    shape = StepShape(2, [0, 0], 10)
    assert [chooses.guard(lambda: chooses.scheduled(1, shape, 0.0), otherwise=4) for _ in range(3)] == [4] * 3
    assert len(said) == 1 and "TypeError" in said[0] and "\n" not in said[0]
    assert not chooses.status()["speculation_on"]


def test_nothing_is_drafted_where_the_drafter_cannot_draft():
    chooses = control()
    chooses.selector.choose = lambda active, context, explore: Strategy("eagle3", 4)
    assert chooses.scheduled(1, StepShape(2, [0, 0], 100), 0.0) == 4
    assert chooses.scheduled(2, StepShape(2, [4, 4], 100, fits=False), 0.0) == 0


def test_steps_in_flight_at_a_verdict_bring_no_second_one():
    said = []
    watchdog = DraftWatchdog(said.append)
    for now in (1.0, 2.0, 3.0):
        watchdog.observe(256, 0, now)
    assert watchdog.trips["dead"] == len(said) == 1


def test_results_that_never_come_are_forgotten():
    chooses = control()
    for number in range(1000):
        chooses.scheduled(number, StepShape(1, [0], 10), float(number))
    assert len(chooses._in_flight) <= 64


def test_schedules_name_every_depth_for_any_batch():
    assert draft_depths("eagle3", 5) == [0, 1, 2, 3, 4, 5]
    assert draft_depths("eagle3", 10) == [0, 1, 2, 3, 4, 7, 10]
    assert draft_depths("eagle3", 1) == [0, 1]
    assert listing_schedule([0, 2, 4]) == [[1, 1, 0], [2, 2, 2], [3, 100_000, 4]]
    assert listing_schedule([3]) == [[1, 100_000, 3]]
