"""What the cost model learns, restores and forgets."""

from dataclasses import replace

import pytest

from paceline.rollout.strategy import PLAIN, StepFeedback, Strategy
from paceline.rollout.strategy.buckets import Bucket, bucket_of
from paceline.rollout.strategy.cost_model import CostModel


def test_a_state_without_plain_decoding_is_restored():
    """Each bucket is compared with the other, whichever comes first."""
    state = {
        "forward": [[8, 512, "suffix:1", 0.02], [16, 512, "suffix:1", 0.03], [4, 512, "suffix:2", 0.02]],
        "draft": [],
        "level": [],
        "rest": [],
        "acceptance": [],
    }
    restored = CostModel(lambda batch, tokens, context: 0.01, lambda drafter, batch: 0.0)
    restored.load_state(state)
    assert restored.seconds(Strategy("suffix", 1), Bucket(8, 512)) == pytest.approx(0.02)
    assert restored.seconds(Strategy("suffix", 1), Bucket(32, 512)) > 0


def test_a_bucket_whose_times_were_dropped_is_no_longer_the_nearest():
    """Times of a drafter that have changed after a pause make its other times there worthless."""
    model = CostModel(lambda batch, tokens, context: 0.01, lambda drafter, batch: 0.0)
    near, deep, shallow = Bucket(8, 512), Strategy("suffix", 2), Strategy("suffix", 1)

    def steps(strategy, seconds, count):
        drafted = [strategy.depth] * 8
        for _ in range(count):
            model.add(StepFeedback(strategy, 8, 400, drafted, [0] * 8, 8, 0.0, seconds, seconds))

    steps(shallow, 0.02, 3)
    steps(deep, 0.02, 3)
    steps(PLAIN, 0.01, 60)
    assert model.seconds(shallow, Bucket(16, 512)) > 0  # from the near bucket
    steps(deep, 0.2, 12)
    assert not model.timed(shallow, near)
    assert model.seconds(shallow, Bucket(16, 512)) > 0


def test_what_a_drafter_reads_after_a_pause_is_no_part_of_its_step():
    model, arm = CostModel(lambda batch, width, context: 1.0, lambda name, batch: 0.1), Strategy("eagle3", 1)
    step = StepFeedback(arm, 8, 400, [1] * 8, [0] * 8, 8, 0.1, 1.0, 1.1)
    plain = StepFeedback(PLAIN, 8, 400, [0] * 8, [0] * 8, 8, 0.0, 1.0, 1.0)
    resumed = replace(step, draft_seconds=0.9, total_seconds=1.9, caught_up=True)
    bucket = bucket_of(8, 400)
    assert model.add(step) and model.add(plain)
    assert model.catching_up(arm, bucket) == 0, "nothing is known of it"
    assert not model.add(resumed)
    assert model.catching_up(arm, bucket) == 0, "it ran last"
    assert model.add(plain)
    assert model.catching_up(arm, bucket) == pytest.approx(0.8)
    assert model.seconds(arm, bucket) == pytest.approx(1.1)
    restored = CostModel(lambda batch, width, context: 1.0, lambda name, batch: 0.1)
    restored.load_state(model.state())
    assert restored.catching_up(arm, bucket) == pytest.approx(0.8)
