"""GRPO, Dr. GRPO, DAPO and GSPO against numbers worked by hand."""

import math

import pytest
import torch

from paceline.rl.algorithms.grpo import group_advantages, policy_loss, token_weights, weight_total


def test_advantages_by_hand():
    """Rewards 1, 0, 0, 1: mean 1/2, sample std √(4·(1/2)²/3) = 1/√3, so ±(1/2)·√3 = ±0.8660."""
    out = group_advantages(torch.tensor([1.0, 0.0, 0.0, 1.0]), 4)
    torch.testing.assert_close(out, torch.tensor([1.0, -1.0, -1.0, 1.0]) * math.sqrt(3) / 2)


def test_advantages_without_scaling():
    out = group_advantages(torch.tensor([1.0, 0.0, 0.0, 0.0]), 4, scale_by_std=False)
    torch.testing.assert_close(out, torch.tensor([0.75, -0.25, -0.25, -0.25]))


@pytest.mark.parametrize("reward", [0.0, 1.0])
def test_a_group_that_all_fails_or_all_succeeds_says_nothing(reward):
    out = group_advantages(torch.tensor([reward] * 4 + [0.0, 1.0, 0.0, 1.0]), 4)
    assert out[:4].tolist() == [0.0] * 4
    assert (out[4:] != 0).all()


def test_loss_by_hand():
    """Ratios 1.5, 0.5, 1.5, 0.5 with advantages +1, +1, −1, −1 and clip 0.2/0.3.

    min(1.5, 1.3) = 1.3; min(0.5, 0.8) = 0.5; min(−1.5, −1.3) = −1.5; min(−0.5, −0.8) = −0.8. The loss is
    their negative.
    """
    ratio = torch.tensor([1.5, 0.5, 1.5, 0.5])
    logprobs = ratio.log().requires_grad_()
    advantages = torch.tensor([1.0, 1.0, -1.0, -1.0])
    out = policy_loss(logprobs, torch.zeros(4), advantages, clip_low=0.2, clip_high=0.3)
    torch.testing.assert_close(out.loss.detach(), torch.tensor([-1.3, -0.5, 1.5, 0.8]))
    assert out.clipped.tolist() == [True, False, False, True]
    out.loss.sum().backward()
    torch.testing.assert_close(logprobs.grad, torch.tensor([0.0, -0.5, 1.5, 0.0]))


def test_sequence_ratio_by_hand():
    """GSPO: two tokens with log-ratios ln 1.44 and 0 have the ratio √1.44 = 1.2 both, one of ln 0.5 has 0.5.
    With a clip of 0.1 and advantage 1 that counts as 1.1 and 0.5. What is not clipped has a gradient: −0.5
    for the one token."""
    logprobs = torch.tensor([math.log(1.44), 0.0, math.log(0.5)], requires_grad=True)
    owner = torch.tensor([0, 0, 1])
    out = policy_loss(logprobs, torch.zeros(3), torch.ones(3), clip_low=0.1, clip_high=0.1, owner=owner)
    torch.testing.assert_close(out.loss.detach(), torch.tensor([-1.1, -1.1, -0.5]))
    assert out.clipped.tolist() == [True, True, False]
    out.loss.sum().backward()
    torch.testing.assert_close(logprobs.grad, torch.tensor([0.0, 0.0, -0.5]))


def test_a_sequences_gradient_is_its_ratio_over_its_length():
    """d s / d logprob_t = s / |y| for every token: with s = 1 and |y| = 4, summed over four equal token
    losses, −1 each.
    """
    logprobs = torch.zeros(4, requires_grad=True)
    out = policy_loss(
        logprobs,
        torch.zeros(4),
        torch.ones(4),
        clip_low=0.1,
        clip_high=0.1,
        owner=torch.zeros(4, dtype=torch.long),
    )
    (out.loss / 4).sum().backward()  # a sequence's weight of one, shared by its tokens
    torch.testing.assert_close(logprobs.grad, torch.full((4,), -0.25))


def test_what_weighs_alike_by_hand():
    """Samples of 1 and 3 tokens whose losses are 4 and 0 a token: mean of tokens 4/4 = 1, mean of samples (4
    + 0) / 2 = 2, and over
    a longest completion of 8: 4/8 / 2 = 1/4."""
    lengths, losses = torch.tensor([1, 3]), torch.tensor([4.0, 0.0])
    for aggregate, expected in (("token", 1.0), ("sequence", 2.0), ("constant", 0.25)):
        weighted = (token_weights(lengths, aggregate, longest=8) * losses * lengths).sum() / weight_total(
            lengths, aggregate
        )
        assert float(weighted) == pytest.approx(expected)
