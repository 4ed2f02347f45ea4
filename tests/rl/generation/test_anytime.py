"""Anytime reasoning: advantages by hand, answers demanded where thought is cut, thinking and answering
credited apart.
"""

import pytest
import torch

from paceline.rl.algorithms.brpo import brpo_advantages
from paceline.rl.errors import UserError
from paceline.rl.recipe import load_config
from tests.support import tiny_trainer

OPTIONS = (
    "length.anytime={budgets: [4, 8], answers: 2, answer_tokens: 3}",
    "update.advantage=brpo",
    "rollout.max_tokens=12",
)


def test_brpo_by_hand():
    """Two samples, two budgets of weight 1/2. At the first: returns 1/2 and 1, baseline their mean, 3/4. At
    the second both return 1/2; the first was worth 0 before, the second 1/2: baselines (0 + 1/2) / 2 and (1/2
    + 1/2) / 2."""
    scores = torch.tensor([[0.0, 1.0], [1.0, 1.0]])
    wanted = torch.tensor([[-0.25, 0.25], [0.25, 0.0]])
    torch.testing.assert_close(brpo_advantages(scores, torch.ones(2)), wanted)
    torch.testing.assert_close(brpo_advantages(scores, torch.full((2,), 7.0)), wanted)


def test_earlier_budgets_weigh_less_than_nearer_ones():
    """Before the third budget: (0 · 1 + 1 · 2) / 3, and what the last third is worth of it."""
    scores = torch.tensor([[0.0, 1.0, 1.0]])
    found = brpo_advantages(scores, torch.ones(3))
    own = 1 / 3
    assert float(found[0, 2]) == pytest.approx(own - (2 * (2 / 3) / 3 + 1 * own) / 3)


def test_a_budget_that_counts_for_little_says_little():
    scores = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    even, late = (brpo_advantages(scores, torch.tensor(w))[0, 0] for w in ([1.0, 1.0], [1.0, 9.0]))
    assert float(even) == pytest.approx(0.25) and float(late) == pytest.approx(0.05)


def test_one_budget_is_a_group_without_deviation():
    scores = torch.tensor([[1.0], [0.0], [0.0], [1.0]])
    assert brpo_advantages(scores, torch.ones(1))[:, 0].tolist() == [0.5, -0.5, -0.5, 0.5]


def test_the_baseline_lowers_the_variance_of_what_does_not_depend_on_the_stretch():
    """Thoughts of very different worth, which the stretch after them does not change: its advantage is all
    noise.
    """
    g = torch.Generator().manual_seed(0)
    worth = torch.where(torch.rand(500, 1, generator=g) < 0.5, 0.1, 0.9)
    scores = (torch.rand(500, 4, generator=g) < worth).float()
    found = brpo_advantages(scores.view(125, 4, 4)[0], torch.ones(4))
    late = torch.cat([brpo_advantages(group, torch.ones(4))[:, 3] for group in scores.view(125, 4, 4)])
    alone = torch.cat([(group[:, 3] - group[:, 3].mean()) / 4 for group in scores.view(125, 4, 4)])
    assert found.shape == (4, 4)
    assert late.var() < 0.95 * alone.var()


def test_a_step_trains_on_cut_thoughts_and_their_answers(tmp_path, monkeypatch):
    asked, trained = [], []
    with tiny_trainer(tmp_path, monkeypatch, "[float('7' in c) for c in completions]", *OPTIONS) as trainer:
        generate, run = trainer.worker.engine.generate, trainer.learner._updater.run
        monkeypatch.setattr(
            trainer.worker.engine,
            "generate",
            lambda r, *a, **k: asked.append(list(r)) or generate(r, *a, **k),
        )
        monkeypatch.setattr(trainer.learner._updater, "run", lambda s, *a: trained.append(s) or run(s, *a))
        metrics, _ = trainer.step(0)
        marker = trainer.tokenizer("\nAnswer:")["input_ids"]
    whole, demanded = asked[0], asked[1]
    by_prompt = {tuple(r.prompt_ids) for r in whole}
    assert 0 < len(demanded) <= 16 * 2 * 2
    for request in demanded:
        start = next(p for p in by_prompt if tuple(request.prompt_ids[: len(p)]) == p)
        cut = request.prompt_ids[len(start) :]
        assert cut[-len(marker) :] == marker and len(cut) - len(marker) in (4, 8)
        assert request.params.max_tokens == 3
    samples = trained[0]
    assert len(samples) == 16 + len(demanded)
    assert all(len(s.completion) <= 3 for s in samples[16:])
    varied = [s for s in samples[:16] if len(s.completion) == 12 and len(set(s.advantages.tolist())) > 1]
    assert varied and all(len(set(s.advantages[:4].tolist())) == 1 for s in varied)
    assert len(metrics["anytime/accuracy"]) == 3


def test_answers_are_compared_with_those_of_the_same_cut(tmp_path, monkeypatch):
    trained = []
    with tiny_trainer(tmp_path, monkeypatch, "[float(len(c)) for c in completions]", *OPTIONS) as trainer:
        run = trainer.learner._updater.run
        monkeypatch.setattr(trainer.learner._updater, "run", lambda s, *a: trained.append(s) or run(s, *a))
        trainer.step(0)
    answers = trained[0][16:]
    for first, second in zip(answers[::2], answers[1::2], strict=True):
        assert torch.equal(first.prompt, second.prompt)
        assert float(first.advantages[0] + second.advantages[0]) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("update.advantage=brpo",), "write length.anytime"),
        ((OPTIONS[0],), "write brpo"),
        (("length.anytime={budgets: [8, 4]}", *OPTIONS[1:]), "write ascending numbers"),
        (("length.anytime={budgets: [4, 12]}", *OPTIONS[1:]), "to below rollout.max_tokens"),
        (("length.anytime={budgets: [4], answers: 1}", *OPTIONS[1:]), "at least 2"),
        (("length.anytime={budgets: [4], weights: [1.0]}", *OPTIONS[1:]), "write 2 numbers"),
        ((*OPTIONS, "length.rewards=[{name: overlong}]"), "choose one"),
        ((*OPTIONS, "rollout.segment_tokens=4"), "leave out"),
        ((*OPTIONS, "update.kl_coef=0.1"), "kl_coef: 0"),
    ],
)
def test_what_does_not_go_together_is_refused(options, says):
    with pytest.raises(UserError, match=says):
        load_config("configs/tiny.yaml", ["measure.plain_every=0", "update.kl_coef=0", *options])
