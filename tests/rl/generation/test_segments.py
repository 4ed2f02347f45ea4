"""Segment rollouts: what is carried over steps is what whole rollouts would have been, and says under which
policy it was drawn.
"""

import json

import pytest
import torch

from paceline.rl.algorithms.grpo import mastered_tokens
from paceline.rl.checkpointing.checkpoint import find_checkpoint
from paceline.rl.errors import UserError
from paceline.rl.learner.policy import PolicyLearner
from paceline.rl.recipe import load_config
from paceline.rl.trainer import Trainer
from tests.support import tiny_trainer

LENGTHS = "[float(len(c)) for c in completions]"
STOPS = "rollout.stop_strings=['0', '1', '2', '3', '4', '5', '6', '7', '8', '9']"  # so that lengths differ
SEGMENTS = (
    "rollout.segment_tokens=6",
    "rollout.max_tokens=20",
    "rollout.prompts_per_step=2",
    "steps=9",
    STOPS,
)


def played(trainer: Trainer, steps: int) -> list[tuple[str, list[int], list[tuple[int, int]]]]:
    """Runs some steps; each completion that was trained on: its problem, tokens and segments."""
    seen = []
    learn = trainer.learner.learn

    def watched(done, *arguments):
        seen.extend(
            (p.key, r.token_ids, r.segments) for p, r in zip(done.problems, done.rollouts, strict=True)
        )
        return learn(done, *arguments)

    trainer.learner.learn = watched
    for step in range(steps):
        trainer.step(step)
    return seen


def test_with_a_policy_that_stands_still_segments_are_the_whole_rollouts(tmp_path, monkeypatch):
    found = []
    for name, options in (("cut", SEGMENTS), ("whole", SEGMENTS[1:])):
        folder = tmp_path / name
        folder.mkdir()
        with tiny_trainer(
            folder, monkeypatch, LENGTHS, *options, "update.lr=1e-30", "task.size=40"
        ) as trainer:
            found.append(played(trainer, 6))
    cut, whole = ({(key, tuple(tokens)) for key, tokens, _ in seen} for seen in found)
    assert cut < whole and len(cut) >= 8 * 2
    assert all(len(segments) > 1 for _, tokens, segments in found[0] if len(tokens) > 13)
    assert all(sum(count for _, count in segments) == len(tokens) for _, tokens, segments in found[0])


def test_groups_are_trained_on_whole_and_only_once(tmp_path, monkeypatch):
    with tiny_trainer(tmp_path, monkeypatch, LENGTHS, *SEGMENTS, "task.size=40") as trainer:
        seen = played(trainer, 6)
        carried = [group.problem.key for group in trainer.worker.groups.open]
    keys = [key for key, _, _ in seen[::4]]
    assert [key for key, _, _ in seen] == [key for key in keys for _ in range(4)]
    assert len(keys) == len(set(keys)) and not set(keys) & set(carried)
    assert len(keys) + len(carried) == 6 * 2


def test_metrics_say_what_is_carried_and_stale(tmp_path, monkeypatch):
    with tiny_trainer(
        tmp_path, monkeypatch, LENGTHS, *SEGMENTS, "update.importance=token", "update.lr=1e-2"
    ) as trainer:
        steps = [trainer.step(number)[0] for number in range(5)]
    assert any(m["rollout/carried"] > 0 for m in steps)
    assert any(m["rollout/stale_share"] > 0.2 for m in steps)
    assert max(m["engine/importance_std"] for m in steps) > 1e-3
    assert all(m["length/mean"] > 0 for m in steps)


def test_a_checkpoint_keeps_what_is_carried(tmp_path, monkeypatch):
    with tiny_trainer(tmp_path, monkeypatch, LENGTHS, *SEGMENTS) as trainer:
        for number in range(3):
            trainer.step(number)
        trainer._save(3)
        before = trainer.worker.groups.open_state()
        assert before
        checkpoint = find_checkpoint(tmp_path / "run")
        assert json.loads(json.dumps(before)) == checkpoint.state["open"]
        trainer.worker.groups.open = []
        for name in ("metrics.jsonl", "timeline.jsonl", "rollouts.jsonl"):
            (tmp_path / "run" / name).touch()
        trainer._resume(checkpoint)
        assert trainer.worker.groups.open_state() == before
        assert trainer.step(3)[0]["length/mean"] > 0


def test_mastered_tokens_are_confident_and_positive():
    """Only the first is both: ln 0.995 and a positive advantage."""
    logprobs = torch.tensor([0.995, 0.5, 0.995, 0.995]).log()
    assert mastered_tokens(logprobs, torch.tensor([1.0, 1.0, -1.0, 0.0]), 0.99).tolist() == [
        True,
        False,
        False,
        False,
    ]


@pytest.mark.parametrize(("entropy", "masked"), [(0.1, True), (1.0, False), (None, False)])
def test_masking_begins_below_the_target_entropy(tmp_path, monkeypatch, entropy, masked):
    options = ("update.mask_mastered=1e-9", "update.mastered_below=0.2", "rollout.max_tokens=8")
    with tiny_trainer(tmp_path, monkeypatch, LENGTHS, *options) as trainer:
        assert isinstance(trainer.learner, PolicyLearner)
        trainer.learner.entropy = entropy
        metrics, _ = trainer.step(0)
        assert (metrics["update/mastered"] > 0.1) == masked
        assert trainer.learner.entropy == pytest.approx(metrics["update/entropy"])


def test_masked_tokens_leave_the_loss(tmp_path, monkeypatch):
    """At the parameters that drew them a token's loss is its negative advantage: without the positive ones no
    loss is below 0.
    """
    losses = []
    for name, entropy in (("all", 1.0), ("masked", 0.1)):
        folder = tmp_path / name
        folder.mkdir()
        options = ("update.mask_mastered=1e-9", "rollout.max_tokens=8", "update.minibatches=1")
        with tiny_trainer(
            folder, monkeypatch, "[float(len(set(c))) for c in completions]", *options
        ) as trainer:
            trainer.learner.entropy = entropy
            metrics, (record,) = trainer.step(0)
        losses.append(metrics["update/loss"])
    weighed = list(zip(record["advantages"], record["lengths"], strict=True))
    moving = sum(n for a, n in weighed if a)
    assert losses[0] == pytest.approx(-sum(a * n for a, n in weighed) / moving, abs=1e-3)
    assert losses[1] == pytest.approx(-sum(min(a, 0) * n for a, n in weighed) / moving, abs=1e-3)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("rollout.segment_tokens=0",), "write at least 1, or null"),
        (("rollout.segment_tokens=8", "rollout.resample=1"), "cannot be combined"),
        (("rollout.segment_tokens=8", "measure.plain_every=2"), "measure.plain_every: 0"),
        (("update.mask_mastered=2.0",), "write a probability"),
    ],
)
def test_what_does_not_go_together_is_refused(options, says):
    with pytest.raises(UserError, match=says):
        load_config(
            "configs/tiny.yaml",
            ["update.kl_coef=0", *(() if "plain" in str(options) else ("measure.plain_every=0",)), *options],
        )
