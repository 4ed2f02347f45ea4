"""Our losses and gradients beside those that TRL's GRPOTrainer computes from the same numbers."""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from trl import GRPOTrainer

from paceline.rl.algorithms.grpo import policy_loss, token_weights, weight_total
from paceline.rl.algorithms.kl import estimate_kl

LENGTHS = torch.tensor([7, 3, 5, 1])
LONGEST = 9
CLIP_LOW, CLIP_HIGH = 0.2, 0.28


def numbers() -> dict[str, torch.Tensor]:
    """[4, 7] each: log-probs that have moved by up to half a nat from the old ones, so that some ratios are
    clipped.
    """
    generator = torch.Generator().manual_seed(0)
    now = -torch.rand(4, 7, generator=generator) * 3
    return {
        "now": now,
        "old": now + (torch.rand(4, 7, generator=generator) - 0.5),
        "reference": now + 0.3 * torch.randn(4, 7, generator=generator),
        "mask": (torch.arange(7) < LENGTHS[:, None]).long(),
    }


ADVANTAGES = torch.tensor([1.2, -0.7, 0.4, -0.9])


def theirs(loss_type: str, level: str, beta: float) -> tuple[float, torch.Tensor]:
    """TRL's own method on a trainer that has only what this method reads."""
    n = numbers()
    now = n["now"].clone().requires_grad_()
    trainer = GRPOTrainer.__new__(GRPOTrainer)
    trainer.__dict__.update(
        loss_type=loss_type,
        importance_sampling_level=level,
        beta=beta,
        epsilon_low=CLIP_LOW,
        epsilon_high=CLIP_HIGH,
        max_completion_length=LONGEST,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        aux_loss_enabled=False,
        use_vllm=False,
        current_gradient_accumulation_steps=1,
        model=SimpleNamespace(training=True),
        accelerator=Accelerator(cpu=True),
        args=SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=1),
        _entropy_bonus_enabled=False,
        _metrics={"train": defaultdict(list)},
    )
    trainer._get_per_token_logps_and_entropies = lambda *arguments, **options: (
        now,
        torch.zeros_like(now),
        None,
    )
    loss = trainer._compute_loss(
        None,
        {
            "prompt_ids": torch.zeros(4, 1, dtype=torch.long),
            "prompt_mask": torch.ones(4, 1, dtype=torch.long),
            "completion_ids": torch.zeros(4, 7, dtype=torch.long),
            "completion_mask": n["mask"],
            "advantages": ADVANTAGES,
            "old_per_token_logps": n["old"],
            "ref_per_token_logps": n["reference"],
            "num_items_in_batch": LENGTHS.sum(),
        },
    )
    loss.backward()
    return float(loss), now.grad


def ours(aggregate: str, level: str, beta: float) -> tuple[float, torch.Tensor]:
    """The same tokens without padding, weighted as the update weighs them."""
    n = numbers()
    real = n["mask"].bool()
    now = n["now"].clone().requires_grad_()
    owner = torch.arange(4)[:, None].expand(4, 7)[real]
    line = now[real]
    each = policy_loss(
        line,
        n["old"][real],
        ADVANTAGES[owner],
        clip_low=CLIP_LOW,
        clip_high=CLIP_HIGH,
        owner=owner if level == "sequence" else None,
    )
    loss = each.loss + beta * estimate_kl(line, n["reference"][real], "k3")
    weights = token_weights(LENGTHS, aggregate, LONGEST)[owner]
    total = (loss * weights).sum() / weight_total(LENGTHS, aggregate)
    total.backward()
    return float(total.detach()), now.grad


@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize(
    ("loss_type", "aggregate", "level"),
    [
        ("grpo", "sequence", "token"),
        ("bnpo", "token", "token"),
        ("dapo", "token", "token"),
        ("dr_grpo", "constant", "token"),
        ("grpo", "sequence", "sequence"),
    ],
)
def test_loss_and_gradient_are_trls(loss_type, aggregate, level, beta):
    their_loss, their_gradient = theirs(loss_type, level, beta)
    our_loss, our_gradient = ours(aggregate, level, beta)
    assert our_loss == pytest.approx(their_loss, rel=1e-5)
    torch.testing.assert_close(our_gradient, their_gradient, rtol=1e-4, atol=1e-7)
    assert (their_gradient[numbers()["mask"].bool()] == 0).any() == (beta == 0 and level == "token"), (
        "some are clipped"
    )
