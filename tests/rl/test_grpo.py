"""GRPO against numbers worked by hand."""

import math

import pytest
import torch

from rl.algorithms.grpo import group_advantages, grpo_loss


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

    min(1.5, 1.3) = 1.3; min(0.5, 0.8) = 0.5; min(−1.5, −1.3) = −1.5; min(−0.5, −0.8) = −0.8. The loss is their negative.
    """
    ratio = torch.tensor([1.5, 0.5, 1.5, 0.5])
    logprobs = ratio.log().requires_grad_()
    advantages = torch.tensor([1.0, 1.0, -1.0, -1.0])
    out = grpo_loss(logprobs, torch.zeros(4), advantages, clip_low=0.2, clip_high=0.3)
    torch.testing.assert_close(out.loss.detach(), torch.tensor([-1.3, -0.5, 1.5, 0.8]))
    assert out.clipped.tolist() == [True, False, False, True]
    out.loss.sum().backward()
    torch.testing.assert_close(logprobs.grad, torch.tensor([0.0, -0.5, 1.5, 0.0]))


def test_kl_by_hand():
    """Policy 0.5, reference 0.25: d = ln(1/2), e^d − d − 1 = 0.5 + 0.6931 − 1 = 0.1931."""
    logprobs = torch.tensor([math.log(0.5)])
    out = grpo_loss(
        logprobs,
        logprobs,
        torch.tensor([0.0]),
        clip_low=0.2,
        clip_high=0.2,
        reference_logprobs=torch.tensor([math.log(0.25)]),
        kl_coef=0.1,
    )
    torch.testing.assert_close(out.kl, torch.tensor([math.log(2) - 0.5]))
    torch.testing.assert_close(out.loss, 0.1 * out.kl)
