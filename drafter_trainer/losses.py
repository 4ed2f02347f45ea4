"""Distillation losses of a draft position."""

from __future__ import annotations

import torch


def soft_cross_entropy(draft_logits: torch.Tensor, teacher_probs: torch.Tensor) -> torch.Tensor:
    """−Σ_y p(y) log q(y): forward KL up to the teacher's entropy (EAGLE-3, arXiv 2503.01840, section 3.2).

    Args:
        draft_logits: float [M, W], over the draft vocabulary.
        teacher_probs: float [M, W], the target's probabilities of those tokens; the mass of a row may be below 1, and then
            weighs the row by how much of the target's mass can be drafted at all.

    Returns:
        float32 [M].
    """
    return -(teacher_probs * torch.log_softmax(draft_logits.float(), dim=-1)).sum(-1)
