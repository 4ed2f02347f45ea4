"""Why speculation won or lost, from a run's numbers."""

import pytest

from paceline.rl.monitoring.speculation_verdict import verdict


def step(index, speedup=None, **others):
    """A step in which rollouts took 10 s with speculation."""
    m = {
        "step": index,
        "rollout/acceptance_length": 2.2,
        "rollout/acceptance_length_eagle3": 2.5,
        "rollout/drafted": 1000,
        "rollout/accepted": 600,
        "rollout/draft_seconds_eagle3": 0.5,
        "rollout/draft_seconds_suffix": 0.1,
        "rollout/drafting_share": 0.06,
        "rollout/active_mean": 5.0,
        "rollout/speculating_share": 0.9,
        "length/max": 224,
        "drafter/updates": 4,
    }
    if speedup is not None:
        m |= {
            "measure/plain_seconds": 10 * speedup,
            "measure/adaptive_seconds": 10.0,
            "measure/rollout_speedup": speedup,
        }
        m["measure/identical"] = 1.0
    return m | {name.replace("__", "/"): value for name, value in others.items()}


def test_nothing_is_said_of_what_was_not_measured():
    assert verdict([step(0), step(1)]) == []


def test_by_how_much_it_won():
    assert verdict([step(4, 1.5), step(9, 1.7)]) == [
        "speculation won: 1.60x plain decoding, saving 6.0 s per step; 2.20 tokens per forward pass"
    ]


@pytest.mark.parametrize(
    ("metrics", "says"),
    [
        ([step(0, 0.5)], "cold: only step 1 was measured"),
        ([step(1, 0.2), step(4, 1.2)], "cold: 0.20x in the first steps, 1.20x in the later ones"),
        ([step(4, 0.8, **{"drafter__updates": 0})], "the drafter was never trained"),
        (
            [step(4, 0.8, **{"drafter__held_back_seconds": 30.0, "drafter__seconds": 2.0})],
            "the drafter's training was held back for 30 s",
        ),
        (
            [step(4, 0.8, **{"rollout__acceptance_length": 1.1, "rollout__accepted": 90})],
            "90 of 1000 drafted tokens were accepted (eagle3 2.50 tokens per forward pass",
        ),
        (
            [step(4, 0.8, **{"rollout__drafting_share": 0.31, "rollout__draft_seconds_suffix": 2.0})],
            "drafting takes 31% of the rollouts' time, most of it suffix (2.0 s)",
        ),
        (
            [step(4, 0.8, **{"rollout__active_mean": 40.0})],
            "the batch is large: 40 sequences together on average, drafts in 90%",
        ),
        ([step(4, 0.8, **{"measure__identical": 0.1})], "only 10% of the completions were identical"),
        ([step(4, 0.8)], "neither acceptance nor drafting time nor batch size explains it"),
    ],
)
def test_why_it_lost_and_what_to_change(metrics, says):
    first, *reasons = verdict(metrics)
    assert first.startswith("speculation lost: ")
    assert says in reasons[0]
    assert any(
        word in reasons[0] for word in ("speculation.", "drafter.", "measure.", "rollout.", "by chance")
    )


def test_neither_gain_nor_loss_and_no_drafts():
    assert verdict([step(4, 1.01)])[0].startswith("speculation gained nothing: 1.01x")
    assert verdict([step(4, 1.0, **{"rollout__drafted": 0})]) == [
        "no token was drafted in the measured steps: plain decoding throughout, 1.00x"
    ]


def test_several_reasons_come_together():
    """A large batch whose drafts are rejected and expensive."""
    both = {"rollout__acceptance_length": 1.1, "rollout__drafting_share": 0.3, "rollout__active_mean": 32.0}
    assert len(verdict([step(7, 0.7, **both)])) == 4


def test_lengths_are_no_reason_where_both_sides_decode_as_many_tokens():
    """vLLM draws other tokens, so that there is no share of identical completions."""
    measured = step(4, 0.8)
    del measured["measure/identical"]
    assert "neither acceptance nor drafting time" in " ".join(verdict([measured]))
