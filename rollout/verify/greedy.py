"""Verification at temperature 0."""

from __future__ import annotations

import torch

from rollout.trees.chain import DraftTree
from rollout.verify.chain import Verification, leading_run


def verify_greedy(logits: torch.Tensor, draft: DraftTree) -> Verification:
    """Keeps the draft while it equals the target's argmax (Leviathan et al., arXiv 2211.17192, section 2.2 with argmax as
    the standardised distribution).

    Theorem. The committed tokens are those of greedy decoding: node i is kept only if it equals the argmax after the kept
    prefix, and the next token is that argmax; by induction on i no other sequence can be produced.

    Args:
        logits: [B, N + 1, V]; the first of tied maxima is the argmax, as in ``torch.argmax``.
        draft: A chain of N nodes.
    """
    best = logits.argmax(-1)
    accepted = leading_run(best[:, :-1] == draft.tokens, draft.lengths)
    return Verification(accepted, best.gather(1, accepted[:, None])[:, 0])
