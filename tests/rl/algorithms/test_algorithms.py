"""RLOO, REINFORCE++, PPO, KL estimates and importance weights against numbers worked by hand and independent
sums.
"""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from paceline.rl.algorithms.advantages import compute_kl_penalties, critic_advantages, token_advantages
from paceline.rl.algorithms.importance import effective_share, importance_weights
from paceline.rl.algorithms.kl import KlCoefficient, estimate_kl
from paceline.rl.algorithms.ppo import generalised_advantages, value_loss
from paceline.rl.algorithms.reinforce_pp import normalise, rewards_to_go
from paceline.rl.algorithms.rloo import leave_one_out_advantages
from paceline.rl.config.critic import CriticConfig
from paceline.rl.config.update import UpdateConfig

ALONE = lambda part: part  # noqa: E731


def test_leave_one_out_by_hand():
    """Rewards 1, 0, 0.5: others' means 0.25, 0.75, 0.5."""
    out = leave_one_out_advantages(torch.tensor([1.0, 0.0, 0.5]), 3)
    torch.testing.assert_close(out, torch.tensor([0.75, -0.75, 0.0]))


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_estimates_average_to_the_kl(kind):
    """Over all outcomes of a distribution: Σ p · estimate = Σ p ln(p / q)."""
    p, q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.25, 0.25, 0.5])
    mean = (p * estimate_kl(p.log(), q.log(), kind)).sum()
    torch.testing.assert_close(mean, (p * (p / q).log()).sum())
    assert kind == "k1" or (estimate_kl(p.log(), q.log(), kind) >= 0).all()


def test_k2_has_the_gradient_of_the_kl():
    p, q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.25, 0.25, 0.5])
    logits = p.log().requires_grad_()
    logprobs = torch.log_softmax(logits, -1)
    (p * estimate_kl(logprobs, q.log(), "k2")).sum().backward()
    estimated, logits.grad = logits.grad.clone(), None
    (torch.softmax(logits, -1) * (torch.log_softmax(logits, -1) - q.log())).sum().backward()
    torch.testing.assert_close(estimated, logits.grad)


def test_kl_estimates_by_hand():
    """Policy 0.5, reference 0.25: d = ln 2; k1 = 0.6931, k2 = d²/2 = 0.2402, k3 = 0.5 − 1 + 0.6931."""
    for kind, expected in (("k1", math.log(2)), ("k2", math.log(2) ** 2 / 2), ("k3", math.log(2) - 0.5)):
        assert float(estimate_kl(torch.tensor(0.5).log(), torch.tensor(0.25).log(), kind)) == pytest.approx(
            expected
        )


def test_the_coefficient_follows_its_target():
    """Twice the target is cut to +0.2: β · 1.02; half of it to −0.2: β · 0.98; a tenth above: β · 1.01."""
    for kl, factor in ((0.2, 1.02), (0.05, 0.98), (0.11, 1.01)):
        coefficient = KlCoefficient(0.5, target=0.1)
        coefficient.observe(kl)
        assert coefficient.value == pytest.approx(0.5 * factor)
    fixed = KlCoefficient(0.5)
    fixed.observe(7.0)
    assert fixed.value == 0.5


def test_rewards_to_go_by_hand():
    torch.testing.assert_close(
        rewards_to_go(1.0, torch.tensor([0.1, 0.2, 0.3])), torch.tensor([0.4, 0.5, 0.7])
    )


def test_normalised_over_ranks():
    """Two ranks, each of which knows its own tokens and the sums: as one batch of both."""
    mine, theirs = [torch.tensor([1.0, 2.0]), torch.tensor([5.0])], [torch.tensor([0.0, 4.0, 0.0])]

    def total(part: torch.Tensor) -> torch.Tensor:
        line = torch.cat(theirs).double()
        if len(part) == 2:
            return part + torch.stack([torch.tensor(3.0, dtype=torch.float64), line.sum()])
        return part + (line - 2.0).square().sum()  # the mean of all six is 2

    everything = torch.cat(mine + theirs)
    expected = (everything - 2) / everything.std(correction=0)
    torch.testing.assert_close(torch.cat(normalise(mine, total)), expected[:3])
    assert normalise([torch.ones(3)], ALONE)[0].tolist() == [0.0] * 3


@given(st.integers(1, 8), st.floats(0.5, 1), st.floats(0, 1), st.integers(0, 1000))
def test_generalised_advantages_are_their_sum(length, gamma, lam, seed):
    """Against Σ_l (γλ)^l δ_{t+l}, written out."""
    generator = torch.Generator().manual_seed(seed)
    rewards, values = torch.rand(2, length, generator=generator)
    advantages, returns = generalised_advantages(rewards, values, gamma, lam)
    after = [*values.tolist()[1:], 0.0]
    delta = [float(rewards[t]) + gamma * after[t] - float(values[t]) for t in range(length)]
    for t in range(length):
        assert float(advantages[t]) == pytest.approx(
            sum((gamma * lam) ** n * d for n, d in enumerate(delta[t:])), abs=1e-4
        )
    torch.testing.assert_close(returns, advantages + values)


def test_with_lambda_one_and_no_discount_the_return_is_what_is_left():
    rewards = torch.tensor([0.0, 0.0, 1.0])
    _, returns = generalised_advantages(rewards, torch.tensor([0.3, 0.9, 0.1]), 1.0, 1.0)
    torch.testing.assert_close(returns, torch.ones(3))


def test_value_loss_by_hand():
    """Value 1.0 after 0.5, return 2: (1 − 2)² = 1, clipped to 0.7: 1.69; the larger, halved."""
    loss = value_loss(torch.tensor([1.0]), torch.tensor([0.5]), torch.tensor([2.0]), clip=0.2)
    torch.testing.assert_close(loss, torch.tensor([1.69 / 2]))
    torch.testing.assert_close(
        value_loss(torch.tensor([1.0]), torch.tensor([0.5]), torch.tensor([2.0]), None), torch.tensor([0.5])
    )


def test_importance_by_hand():
    """Ratios 2 and 1/2 of one sequence, 4 of another; cap 3."""
    trainer, engine = torch.tensor([2.0, 0.5, 4.0]).log(), torch.zeros(3)
    owner = torch.tensor([0, 0, 1])
    assert importance_weights(trainer, engine, owner, "token", 3.0).tolist() == pytest.approx([2.0, 0.5, 3.0])
    assert importance_weights(trainer, engine, owner, "sequence", 3.0).tolist() == pytest.approx(
        [1.0, 1.0, 3.0]
    )
    assert importance_weights(trainer, engine, owner, "none", 3.0).tolist() == [1.0] * 3
    # weights 1 and 3: (1 + 3)² / (2 · 10) = 0.8
    assert effective_share(4.0, 10.0, 2) == pytest.approx(0.8)
    assert effective_share(0.0, 0.0, 0) == 1.0


def test_the_penalty_in_the_reward():
    """β = 0.5 and k1: each token costs half of its log-ratio; group advantages are of what is left of the
    reward.
    """
    update = UpdateConfig(kl_coef=0.5, kl="k1", kl_in="reward", scale_by_std=False)
    drawn, reference = (
        [torch.tensor([0.0, -1.0]), torch.tensor([-1.0])],
        [torch.tensor([-0.4, -1.2]), torch.tensor([-1.0])],
    )
    taken = compute_kl_penalties(update, 0.5, drawn, reference)
    assert taken[0].tolist() == pytest.approx([0.2, 0.1]) and taken[1].tolist() == [0.0]
    advantages = token_advantages(update, 2, [1.0, 0.0], taken, ALONE)
    assert advantages[0].tolist() == pytest.approx([0.35, 0.35]) and advantages[1].tolist() == pytest.approx(
        [-0.35]
    )
    in_loss = UpdateConfig(kl_coef=0.5)
    assert [p.tolist() for p in compute_kl_penalties(in_loss, 0.5, drawn, reference)] == [[0.0, 0.0], [0.0]]


def test_each_estimator_of_advantages():
    taken = [torch.zeros(2), torch.zeros(1)]
    rloo = token_advantages(UpdateConfig(advantage="rloo"), 2, [1.0, 0.0], taken, ALONE)
    assert [a.tolist() for a in rloo] == [[1.0, 1.0], [-1.0]]
    plus = token_advantages(UpdateConfig(advantage="reinforce_pp"), 2, [1.0, 0.0], taken, ALONE)
    assert float(torch.cat(plus).mean()) == pytest.approx(0, abs=1e-6)
    with pytest.raises(ValueError, match="critic"):
        token_advantages(UpdateConfig(advantage="gae"), 2, [1.0, 0.0], taken, ALONE)
    advantages, returns = critic_advantages(CriticConfig(gae_lambda=1.0), [1.0, 0.0], taken, taken, ALONE)
    assert [r.tolist() for r in returns] == [[1.0, 1.0], [0.0]]
    assert torch.cat(advantages).tolist() == pytest.approx([2**-0.5, 2**-0.5, -(2**0.5)])
