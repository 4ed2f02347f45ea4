"""The elastic rule speculates where the measured times say it pays, and nowhere else."""

import pytest

from rollout.strategy import PLAIN, ElasticSelector, FixedSelector, StepFeedback, Strategy
from rollout.strategy.elastic import batch_bucket


def feed(selector, strategy, active, accept, *, forward, draft=0.0, steps=30):
    """Runs ``steps`` of ``strategy`` whose draft tokens are each kept with a fixed pattern."""
    for _ in range(steps):
        selector.record(
            StepFeedback(
                strategy=strategy,
                active=active,
                context=100,
                width=strategy.depth + 1,
                drafted=[strategy.depth] * active,
                accepted=[accept] * active,
                draft_seconds=draft,
                forward_seconds=forward,
                total_seconds=forward + draft + 0.001,
            )
        )


def selector_with(flat: bool) -> ElasticSelector:
    """Forwards that cost nearly the same at any width (memory-bound), or in proportion to it (compute-bound)."""
    return ElasticSelector(
        ("suffix",), 6, lambda b, w: 0.03 * (1 + 0.05 * (w - 1)) if flat else 0.03 * b * w, lambda name, b: 0.0005
    )


def test_speculates_when_width_is_cheap():
    assert selector_with(flat=True).choose(1, 50).depth >= 3


def test_is_plain_when_every_token_costs():
    assert selector_with(flat=False).choose(16, 50) == PLAIN


def test_stops_when_nothing_is_accepted_and_probes_again():
    selector = selector_with(flat=True)
    feed(selector, Strategy("suffix", 6), 1, accept=0, forward=0.035, draft=0.002)
    feed(selector, PLAIN, 1, accept=0, forward=0.03)
    choices = [selector.choose(1, 50) for _ in range(100)]
    assert choices[0] == PLAIN
    probes = [i for i, c in enumerate(choices) if c != PLAIN]
    assert probes == [48, 49, 50, 51], "a few steps of a probe in a hundred plain steps"


def test_a_drafter_left_behind_is_tried_again_and_taken_up():
    """suffix is chosen; eagle3, bad at first, has become better: the text it drafts for may have changed."""
    selector = ElasticSelector(("suffix", "eagle3"), 6, lambda b, w: 0.03 * (1 + 0.02 * (w - 1)), lambda name, b: 0.0005)
    feed(selector, Strategy("eagle3", 6), 1, accept=0, forward=0.033, draft=0.003)
    feed(selector, Strategy("suffix", 3), 1, accept=1, forward=0.032, draft=0.001)
    chosen = []
    for _ in range(300):
        strategy = selector.choose(1, 50)
        chosen.append(strategy.drafter)
        feed(
            selector, strategy, 1, accept=strategy.depth if strategy.drafter == "eagle3" else 1, forward=0.032, draft=0.001, steps=1
        )
    assert chosen[0] == "suffix"
    assert chosen[-50:].count("eagle3") >= 45


def test_a_probe_that_waited_for_a_smaller_batch_ends():
    """At 64 sequences no probe could pay; when few are left, there is one probe, not one without end."""
    selector = ElasticSelector(("suffix",), 6, lambda b, w: 0.03 * (b * w if b > 8 else 1 + 0.05 * (w - 1)), lambda name, b: 0.0005)
    feed(selector, Strategy("suffix", 6), 1, accept=0, forward=0.04, draft=0.002)
    feed(selector, PLAIN, 1, accept=0, forward=0.03)
    assert [selector.choose(64, 50) for _ in range(120)] == [PLAIN] * 120
    choices = [selector.choose(1, 50) for _ in range(40)]
    assert [i for i, c in enumerate(choices) if c != PLAIN] == [0, 1, 2, 3]


def test_recovers_when_the_drafter_gets_better():
    selector = selector_with(flat=True)
    feed(selector, Strategy("suffix", 6), 1, accept=0, forward=0.035, draft=0.002)
    assert selector.choose(1, 50) == PLAIN
    feed(selector, Strategy("suffix", 2), 1, accept=2, forward=0.031, draft=0.001)
    assert selector.choose(1, 50) != PLAIN
    fresh = selector_with(flat=True)
    feed(fresh, Strategy("suffix", 6), 1, accept=0, forward=0.035, draft=0.002)
    fresh.drafter_changed("suffix")
    assert fresh._acceptance["suffix"].expected_tokens(1) > 1.2


def test_depth_follows_acceptance():
    selector = ElasticSelector(("suffix",), 6, lambda b, w: 0.03 * (1 + 0.15 * (w - 1)), lambda name, b: 0.0005)
    feed(selector, Strategy("suffix", 6), 4, accept=1, forward=0.06, draft=0.002)
    assert selector.choose(4, 50).depth <= 2
    feed(selector, Strategy("suffix", 6), 4, accept=6, forward=0.06, draft=0.002, steps=60)
    assert selector.choose(4, 50).depth >= 5


def test_slow_drafters_lose():
    selector = ElasticSelector(("eagle3", "suffix"), 4, lambda b, w: 0.03, lambda name, b: 0.02 if name == "eagle3" else 0.0001)
    assert selector.choose(1, 50).drafter == "suffix"


def test_no_drafter_means_plain():
    assert ElasticSelector((), 4, lambda b, w: 0.03, lambda name, b: 0.0).choose(1, 50) == PLAIN
    assert FixedSelector(Strategy("suffix", 2)).choose(9, 9) == Strategy("suffix", 2)


def test_a_drafter_can_arrive_later():
    selector = ElasticSelector((), 4, lambda b, w: 0.03, lambda name, b: 0.0005)
    selector.drafter_changed("eagle3")
    assert selector.choose(1, 50).drafter == "eagle3"


@pytest.mark.parametrize(("active", "bucket"), [(1, 1), (3, 4), (16, 16), (17, 32), (1000, 256)])
def test_buckets(active, bucket):
    assert batch_bucket(active) == bucket
