"""A collapse is named: the naive penalty's, which GRPO-λ does not have."""

import pytest

from paceline.rl.config.length import GuardConfig
from paceline.rl.errors import UserError
from paceline.rl.monitoring.collapse_guard import CollapseGuard
from tests.support import tiny_trainer

STEPS = 24
DIGITS = "[float(sum(c.isdigit() for c in text) >= 2) for text in completions]"


def step(accuracy, length=100.0, entropy=1.0):
    return {"reward/exact": accuracy, "length/mean": length, "update/entropy": entropy}


def test_accuracy_that_falls_from_its_best_is_named_once():
    guard = CollapseGuard(GuardConfig(window=2, accuracy_fall=0.5))
    lines = [
        guard.observe(step(a, n))
        for a, n in [(0.4, 90), (0.6, 90), (0.5, 60), (0.3, 20), (0.1, 10), (0.1, 5)]
    ]
    assert [line is not None for line in lines] == [False, False, False, False, True, False]
    assert "accuracy collapse: 0.20 of the last 2 steps' completions are correct, 0.55 at best" in lines[4]
    assert "from 75 to 15 tokens" in lines[4] and "\n" not in lines[4]


def test_it_is_named_again_after_a_recovery():
    guard = CollapseGuard(GuardConfig(window=1))
    lines = [guard.observe(step(a)) for a in (0.8, 0.1, 0.7, 0.2)]
    assert [line is not None for line in lines] == [False, True, False, True]


def test_entropy_under_its_floor_is_named():
    guard = CollapseGuard(GuardConfig(window=2, entropy_floor=0.1))
    metrics = step(0.5, entropy=0.01)
    assert guard.observe(step(0.5, entropy=0.3)) is None
    assert guard.observe(dict(step(0.5, entropy=0.15))) is None
    assert "entropy collapse: 0.08 nats" in guard.observe(metrics)
    assert metrics["guard/collapsed"] == 1


def test_it_goes_on_from_its_state():
    first = CollapseGuard(GuardConfig(window=2))
    for accuracy in (0.8, 0.8, 0.1):
        first.observe(step(accuracy))
    second = CollapseGuard(GuardConfig(window=2))
    second.load_state(first.state())
    assert second.observe(step(0.1)) is not None


def test_off_does_not_look():
    guard = CollapseGuard(GuardConfig(action="off", window=1))
    assert [guard.observe(step(a)) for a in (1.0, 0.0)] == [None, None]


@pytest.mark.parametrize(
    ("terms", "collapses"), [("{name: linear, alpha: 6.0}", True), ("{name: grpo_lambda, share: 0.5}", False)]
)
def test_a_naive_penalty_collapses_and_grpo_lambda_does_not(tmp_path, monkeypatch, terms, collapses):
    """Two digits among sixteen characters are right. The naive penalty pays a random model to say nothing;
    GRPO-λ keeps it right."""
    options = ["update.lr=3e-3", "rollout.max_tokens=16", "rollout.group_size=8", f"length.rewards=[{terms}]"]
    accuracy, lengths, lines = [], [], []
    with tiny_trainer(tmp_path, monkeypatch, DIGITS, *options, f"steps={STEPS}") as trainer:
        for number in range(STEPS):
            metrics, _ = trainer.step(number)
            lines.append(trainer.guard.observe(metrics))
            accuracy.append(metrics["reward/exact"])
            lengths.append(metrics["length/mean"])
    ends = sum(accuracy[-5:]) / 5
    if collapses:
        assert ends < 0.3 and sum(lengths[-5:]) < 0.5 * sum(lengths[:5])
        assert any(line is not None and "accuracy collapse" in line for line in lines)
    else:
        assert ends > 0.9
        assert not any(lines)


def test_stop_ends_the_run(tmp_path, monkeypatch):
    options = ["length.guard={action: stop, window: 1}", "steps=3", "save_every=1"]
    with tiny_trainer(tmp_path, monkeypatch, DIGITS, *options) as trainer:
        seen = iter([1.0, 0.0, 1.0])
        monkeypatch.setattr(trainer, "step", lambda number: (dict(step(next(seen)), **LINE), []))
        with pytest.raises(UserError, match=r"accuracy collapse.*the run stops"):
            trainer.run()
    assert (tmp_path / "run" / "checkpoint" / "state.json").is_file()


LINE = {
    "reward/mean": 1.0,
    "length/max": 1,
    "rollout/acceptance_length": 1.0,
    "rollout/seconds": 1.0,
    "time/update": 1.0,
}
