"""Distillation losses of a draft position.

Every loss maps ``(draft_logits, teacher_probs)`` to one value a position: float [M, W] over the draft
vocabulary and float [M, W], the target's probabilities of those tokens, to float32 [M]. A teacher's row may
sum to less than 1: the rest is mass that cannot be drafted.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

_TINY = 1e-8


def soft_cross_entropy(draft_logits: torch.Tensor, teacher_probs: torch.Tensor) -> torch.Tensor:
    """−Σ p(y) log q(y): forward KL up to the teacher's entropy (EAGLE-3, arXiv 2503.01840, section 3.2)."""
    return -(teacher_probs * torch.log_softmax(draft_logits.float(), dim=-1)).sum(-1)


def reverse_kl(draft_logits: torch.Tensor, teacher_probs: torch.Tensor) -> torch.Tensor:
    """Σ q(y) log (q(y) / p(y)): seeks the modes that the teacher has (DistillSpec, arXiv 2310.08461)."""
    log_q = torch.log_softmax(draft_logits.float(), dim=-1)
    return (log_q.exp() * (log_q - teacher_probs.clamp(min=_TINY).log())).sum(-1)


def jensen_shannon(draft_logits: torch.Tensor, teacher_probs: torch.Tensor) -> torch.Tensor:
    """½ KL(p ‖ m) + ½ KL(q ‖ m) with m = ½ (p + q) (DistillSpec, arXiv 2310.08461)."""
    log_q = torch.log_softmax(draft_logits.float(), dim=-1)
    q = log_q.exp()
    log_m = (0.5 * (teacher_probs + q)).clamp(min=_TINY).log()
    of_teacher = teacher_probs * (teacher_probs.clamp(min=_TINY).log() - log_m)
    return 0.5 * (of_teacher + q * (log_q - log_m)).sum(-1)


def total_variation(draft_logits: torch.Tensor, teacher_probs: torch.Tensor) -> torch.Tensor:
    """1 − Σ min(p, q): the probability that a drawn token is refused (Leviathan et al., arXiv 2211.17192,
    theorem 3.5).
    """
    return 1 - torch.minimum(torch.softmax(draft_logits.float(), dim=-1), teacher_probs).sum(-1)


def total_variation_plus(draft_logits: torch.Tensor, teacher_probs: torch.Tensor) -> torch.Tensor:
    """TVD++ (Goel et al., "Direct Alignment of Draft Model", arXiv 2403.00858).

    The gradient of the total variation is that of a policy gradient on the drafter with reward r(y) = 1 where
    p(y) > q(y); TVD++ standardises r over the batch, which lowers its variance. The expectation over the
    drafter is exact here instead of sampled. The value means nothing; the gradient is the method.
    """
    log_q = torch.log_softmax(draft_logits.float(), dim=-1)
    with torch.no_grad():
        q = log_q.exp()
        reward = (teacher_probs > q).float()
        mean = (q * reward).sum() / len(q)
        spread = ((q * (reward - mean) ** 2).sum() / len(q)).sqrt()
        pull = q * (reward - mean) / (spread + 1e-6)
    return -(pull * log_q).sum(-1)


def log_acceptance(draft_logits: torch.Tensor, teacher_probs: torch.Tensor) -> torch.Tensor:
    """−log Σ min(p, q): total variation whose gradient does not vanish where little is accepted (LK losses,
    arXiv 2602.23881).
    """
    accepted = torch.minimum(torch.softmax(draft_logits.float(), dim=-1), teacher_probs).sum(-1)
    return -accepted.clamp(min=_TINY).log()


LOSSES: dict[str, Loss] = {
    "fkl": soft_cross_entropy,
    "rkl": reverse_kl,
    "jsd": jensen_shannon,
    "tvd": total_variation,
    "tvd++": total_variation_plus,
    "log_acceptance": log_acceptance,
}
