"""Losses by hand, by finite differences, and what each is smallest at."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from paceline.drafter_trainer.objective.draft_objective import Objective
from paceline.drafter_trainer.objective.losses import (
    LENGTH_LOSS,
    LOSSES,
    soft_cross_entropy,
    total_variation,
    total_variation_plus,
)
from paceline.drafter_trainer.objective.training_time_test import _Unroll, unrolled_loss
from paceline.drafter_trainer.optimistic_adamw import OptimisticAdamW
from paceline.rollout import Request, SamplingParams
from tests.drafter_trainer.objective.test_training_time_test import packed, traces_of
from tests.engines import engine_for, tiny_eagle3, tiny_llama

HALF = torch.tensor([[0.5, 0.5]])
QUARTER = torch.tensor([[0.25, 0.75]])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("fkl", -0.5 * math.log(0.25) - 0.5 * math.log(0.75)),
        ("rkl", 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)),
        (
            "jsd",
            0.5 * (0.5 * math.log(0.5 / 0.375) + 0.5 * math.log(0.5 / 0.625))
            + 0.5 * (0.25 * math.log(0.25 / 0.375) + 0.75 * math.log(0.75 / 0.625)),
        ),
        ("tvd", 0.25),
        ("log_acceptance", -math.log(0.75)),
    ],
)
def test_values_by_hand(name, value):
    """p = (1/2, 1/2), q = (1/4, 3/4)."""
    assert LOSSES[name](QUARTER.log(), HALF).item() == pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_descent_reaches_the_teacher(name):
    """Every loss makes one free row of logits the teacher's distribution."""
    torch.manual_seed(0)
    teacher = torch.softmax(torch.randn(4, 12), -1)
    logits = torch.zeros(4, 12, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.02)
    for step in range(1500):
        for group in optimizer.param_groups:
            group["lr"] = 0.02 * (1 - step / 1500)
        optimizer.zero_grad()
        LOSSES[name](logits, teacher).sum().backward()
        optimizer.step()
    assert total_variation(logits, teacher).max() < 0.06


def test_tvd_plus_points_where_total_variation_does():
    """Its gradient is total variation's, standardised: the same direction up to a positive factor when the
    batch is one row.
    """
    teacher = torch.softmax(torch.randn(1, 9, generator=torch.Generator().manual_seed(1)), -1)
    gradients = []
    for loss in (total_variation, total_variation_plus):
        logits = torch.randn(1, 9, generator=torch.Generator().manual_seed(2)).requires_grad_()
        loss(logits, teacher).sum().backward()
        gradients.append(logits.grad[0])
    assert torch.nn.functional.cosine_similarity(*gradients, dim=0) > 0.999


def test_mass_outside_the_vocabulary_weighs_a_row():
    thin = HALF * 0.1
    assert soft_cross_entropy(QUARTER.log(), thin).item() == pytest.approx(
        0.1 * soft_cross_entropy(QUARTER.log(), HALF).item()
    )


def test_length_loss_is_minus_the_expected_acceptance_length():
    """1 + E[Σ Π Σ min(p, q)], which the pass reports too; and it can be descended."""
    model = tiny_llama(sharpness=4.0)
    eagle = tiny_eagle3(model)
    _, rollouts = traces_of(model, count=4)
    batch = packed([r.trace for r in rollouts], model, eagle.vocabulary, unroll=3)
    objective = Objective(loss=LENGTH_LOSS, unroll=3)
    optimizer = torch.optim.Adam(eagle.parameters(), lr=5e-4)
    lengths = []
    for _ in range(30):
        outcome = unrolled_loss(eagle, model.model.embed_tokens, batch, objective)
        assert -outcome.loss.item() == pytest.approx(outcome.length - 1, rel=1e-4)
        lengths.append(outcome.length)
        optimizer.zero_grad()
        outcome.loss.backward()
        optimizer.step()
    assert lengths[-1] > lengths[0]


def test_hopeless_positions_are_left_out():
    """With a mask of all tokens nothing is hopeless; with one token only anchors whose likeliest is right
    keep their loss.
    """
    model = tiny_llama(sharpness=4.0)
    eagle = tiny_eagle3(model)
    _, rollouts = traces_of(model, count=4)
    batch = packed([r.trace for r in rollouts], model, eagle.vocabulary, unroll=2)
    losses = {}
    for top in (None, len(eagle.vocabulary), 1):
        with torch.no_grad():
            losses[top] = float(
                unrolled_loss(eagle, model.model.embed_tokens, batch, Objective(unroll=2, mask_top=top)).loss
            )
    assert losses[len(eagle.vocabulary)] == pytest.approx(losses[None])
    assert losses[1] < losses[None]


def test_optimistic_updates_are_one_step_of_adam_ahead_and_leave_its_moments_alone():
    """Against the two sequences of optimistic mirror descent, with Adam's formulas written out in float64."""
    gradients = np.array([[1.0, -2.0], [0.5, 1.0], [-0.3, 0.2], [0.1, 0.4]])
    weight, m, v, ahead = np.zeros(2), np.zeros(2), np.zeros(2), []
    for t, g in enumerate(gradients, 1):
        m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g**2
        step = -0.1 * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.99**t)) + 1e-8)
        weight = weight + step
        ahead.append(weight + step)
    parameter = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
    options = {"lr": 0.1, "betas": (0.9, 0.99), "weight_decay": 0.0}
    ours = OptimisticAdamW([parameter], **options)
    for number, (gradient, expected) in enumerate(zip(gradients, ahead, strict=True)):
        if number == 2:  # the hint is restored with the moments
            state, ours = ours.state_dict(), OptimisticAdamW([parameter], **options)
            ours.load_state_dict(state)
        parameter.grad = torch.from_numpy(gradient.copy())
        ours.step()
        np.testing.assert_allclose(parameter.detach().numpy(), expected, rtol=1e-9)
    np.testing.assert_allclose(ours.state[parameter]["exp_avg"].numpy(), m, rtol=1e-9)


@pytest.fixture(scope="module")
def with_refusals():
    """Traces of rollouts whose drafts were often refused, and their batch."""
    model = tiny_llama(sharpness=4.0)
    eagle = tiny_eagle3(model)
    engine = engine_for(model, collect_traces=True)
    engine.use_strategy("suffix:3")
    rollouts = engine.generate(
        [Request([3, 1, 4, 1, 3, 1, 4], SamplingParams(max_tokens=60), seed=i) for i in range(4)]
    )
    for r in rollouts:
        assert 0 < len(r.trace.refused) <= r.stats.steps
        assert (r.trace.refused[:, 0] > r.trace.num_prompt).all()
    return (
        model,
        eagle,
        rollouts,
        packed([r.trace for r in rollouts], model, eagle.vocabulary, unroll=2, rejected=True),
    )


def test_refused_tokens_are_not_the_texts_and_come_with_what_the_target_says_after_them(with_refusals):
    model, eagle, rollouts, batch = with_refusals
    for r in rollouts:
        for (position, token), final in zip(r.trace.refused.tolist(), r.trace.refused_final, strict=True):
            assert token != int(r.trace.token_ids[position])
            with torch.no_grad():
                text = torch.cat([r.trace.token_ids[:position], torch.tensor([token])])
                wanted = model.model(text[None]).last_hidden_state[0, -1]
            torch.testing.assert_close(final, wanted, rtol=1e-3, atol=1e-4)
    teacher = torch.cat([r.trace.refused_final for r in rollouts]) @ model.lm_head.weight.T
    torch.testing.assert_close(
        batch.rejected_teacher, torch.softmax(teacher, -1)[:, eagle.vocabulary], rtol=1e-3, atol=1e-5
    )


def test_positions_aside_are_those_of_a_text_with_the_refused_token(with_refusals):
    """The loss after a refused token is the second position's of a text in which that token stood."""
    model, eagle, rollouts, _ = with_refusals
    trace = rollouts[0].trace
    (position, token), final = trace.refused[1].tolist(), trace.refused_final[1]
    one = replace(trace, refused=trace.refused[1:2], refused_final=trace.refused_final[1:2])
    batch = packed([one], model, eagle.vocabulary, unroll=2, rejected=True)
    draft = _Unroll(eagle, model.model.embed_tokens, batch)
    altered = trace.token_ids.clone()
    altered[position] = token
    told = _Unroll(
        eagle,
        model.model.embed_tokens,
        packed([replace(one, token_ids=altered)], model, eagle.vocabulary, unroll=2),
    )
    with torch.no_grad():
        draft.advance()
        told.advance()
        told.advance()
        torch.testing.assert_close(
            draft.logits_after_rejected()[0], told.logits(torch.tensor([position - 2]))[0]
        )
        losses = [
            unrolled_loss(eagle, model.model.embed_tokens, batch, Objective(unroll=2, on_policy=w)).loss
            for w in (0.0, 1.0, 2.0)
        ]
    assert losses[0] < losses[1] and losses[2] - losses[1] == pytest.approx(
        float(losses[1] - losses[0]), rel=1e-4
    )
    assert len(final) == model.config.hidden_size


def test_feedback_alone_counts_where_drafts_were_refused(with_refusals):
    """Of all positions, the loss is that of the rows whose token replaced a refused draft."""
    model, eagle, _, batch = with_refusals
    objective = Objective(unroll=1, feedback_only=True)
    with torch.no_grad():
        loss = unrolled_loss(eagle, model.model.embed_tokens, batch, objective).loss
        everything = unrolled_loss(eagle, model.model.embed_tokens, batch, Objective(unroll=1)).loss
        clean = replace(batch, rejected=torch.zeros_like(batch.rejected))
        assert unrolled_loss(eagle, model.model.embed_tokens, clean, objective).loss == 0
        full = replace(batch, rejected=torch.ones_like(batch.rejected))
        torch.testing.assert_close(
            unrolled_loss(eagle, model.model.embed_tokens, full, objective).loss, everything
        )
    assert 0 < loss < everything
