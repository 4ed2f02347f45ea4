"""Distillation losses of a draft position.

Every loss maps ``(draft_logits, teacher_probs)`` to one value per position. ``draft_logits`` is float [M, W]
over the draft vocabulary, ``teacher_probs`` is float [M, W] with the target's probabilities of those tokens,
and the result is float32 [M]. A row of ``teacher_probs`` may sum to less than 1: the rest is the mass of
tokens outside the draft vocabulary. `LOSSES` names the losses that ``drafter.loss`` may select.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

LENGTH_LOSS = "length"  # a loss of whole drafts, which `training_time_test` computes itself
_MIN_PROBABILITY = 1e-8  # keeps logarithms finite


def soft_cross_entropy(draft_logits: torch.Tensor, teacher_probs: torch.Tensor) -> torch.Tensor:
    """Returns −Σ p(y) log q(y), the forward KL up to the teacher's entropy.

    Source: EAGLE-3 (arXiv 2503.01840), section 3.2.
    """
    return -(teacher_probs * torch.log_softmax(draft_logits.float(), dim=-1)).sum(-1)


def reverse_kl(draft_logits: torch.Tensor, teacher_probs: torch.Tensor) -> torch.Tensor:
    """Returns Σ q(y) log (q(y) / p(y)), which is mode-seeking.

    Source: DistillSpec (arXiv 2310.08461).
    """
    log_q = torch.log_softmax(draft_logits.float(), dim=-1)
    return (log_q.exp() * (log_q - teacher_probs.clamp(min=_MIN_PROBABILITY).log())).sum(-1)


def jensen_shannon(draft_logits: torch.Tensor, teacher_probs: torch.Tensor) -> torch.Tensor:
    """Returns ½ KL(p ‖ m) + ½ KL(q ‖ m) with m = ½ (p + q).

    Source: DistillSpec (arXiv 2310.08461).
    """
    log_q = torch.log_softmax(draft_logits.float(), dim=-1)
    q = log_q.exp()
    log_m = (0.5 * (teacher_probs + q)).clamp(min=_MIN_PROBABILITY).log()
    teacher_term = teacher_probs * (teacher_probs.clamp(min=_MIN_PROBABILITY).log() - log_m)
    return 0.5 * (teacher_term + q * (log_q - log_m)).sum(-1)


def total_variation(draft_logits: torch.Tensor, teacher_probs: torch.Tensor) -> torch.Tensor:
    """Returns 1 − Σ min(p, q), the probability that a sampled draft token is rejected.

    Source: Leviathan et al. (arXiv 2211.17192), theorem 3.5.
    """
    return 1 - torch.minimum(torch.softmax(draft_logits.float(), dim=-1), teacher_probs).sum(-1)


def total_variation_plus(draft_logits: torch.Tensor, teacher_probs: torch.Tensor) -> torch.Tensor:
    """Returns the surrogate of TVD++ (Goel et al., "Direct Alignment of Draft Model", arXiv 2403.00858).

    The gradient of the total variation is that of a policy gradient on the drafter with reward r(y) = 1 where
    p(y) > q(y). TVD++ standardises r over the batch, which lowers its variance. The expectation over the
    drafter is exact here instead of sampled. Only the gradient is meaningful, not the value.
    """
    log_q = torch.log_softmax(draft_logits.float(), dim=-1)
    with torch.no_grad():
        q = log_q.exp()
        reward = (teacher_probs > q).float()
        mean = (q * reward).sum() / len(q)
        std = ((q * (reward - mean) ** 2).sum() / len(q)).sqrt()
        advantage = q * (reward - mean) / (std + 1e-6)
    return -(advantage * log_q).sum(-1)


def log_acceptance(draft_logits: torch.Tensor, teacher_probs: torch.Tensor) -> torch.Tensor:
    """Returns −log Σ min(p, q), whose gradient does not vanish at low acceptance as total variation's does.

    Source: LK losses (arXiv 2602.23881).
    """
    accepted = torch.minimum(torch.softmax(draft_logits.float(), dim=-1), teacher_probs).sum(-1)
    return -accepted.clamp(min=_MIN_PROBABILITY).log()


LOSSES: dict[str, Loss] = {
    "fkl": soft_cross_entropy,
    "rkl": reverse_kl,
    "jsd": jensen_shannon,
    "tvd": total_variation,
    "tvd++": total_variation_plus,
    "log_acceptance": log_acceptance,
}
