"""Draft chains: one token after another until the strategy's depth or a stop policy ends the chain."""

from __future__ import annotations

from typing import Protocol

import torch

from paceline.rollout.native import upload
from paceline.rollout.sampling import draw
from paceline.rollout.trees.draft_tree import DraftKind, DraftTree
from paceline.rollout.trees.expander import Expander, Uniform, log_probs, target_ids


class StopPolicy(Protocol):
    """Decides, before every draft token but the first, whether that token is drawn.

    The decision may depend on the drafter's distribution for the token and on the tokens before it, but never
    on the token itself: dropping a token because of its value would give the remaining ones another
    distribution than the reported one, and verification would no longer be lossless.
    """

    def begin(self, batch: int) -> None:
        """Starts a new draft of ``batch`` rows."""
        ...

    def should_continue(self, log_q: torch.Tensor) -> torch.Tensor:
        """Returns which rows draw their next token: bool [B], given its log-probs float32 [B, W]."""
        ...

    def drawn(self, log_q: torch.Tensor, columns: torch.Tensor) -> None:
        """Notes the columns int64 [B] that were drawn from log-probs float32 [B, W]."""
        ...


def grow_chain(
    expander: Expander,
    depth: int,
    uniform: Uniform | None = None,
    greedy: torch.Tensor | None = None,
    stop: StopPolicy | None = None,
) -> DraftTree:
    """Drafts a chain of up to ``depth`` tokens for each row.

    Args:
        expander: The drafter's model.
        depth: Maximum number of tokens.
        uniform: Random numbers of the step, for drawing from the drafter's distribution. None takes the
            likeliest token at each level, so that the draft is a function of the committed tokens.
        greedy: bool [B], rows that take the likeliest token even when the others draw. Their reported
            distribution is all on that token.
        stop: Policy that may end a chain early; None never does.

    Returns:
        A draft without ``parents``, of kind FIXED, or WITH_REPLACEMENT where ``uniform`` is given.
    """
    logits = expander.root()
    batch = len(logits)
    alive = torch.ones(batch, dtype=torch.bool, device=logits.device)
    lengths = torch.zeros(batch, dtype=torch.long)
    tokens, probs = [], []
    if stop is not None:
        stop.begin(batch)
    for level in range(depth):
        log_q = (
            log_probs(logits, expander.temperatures) if stop is not None or uniform is not None else logits
        )
        if stop is not None and level > 0:
            alive = alive & stop.should_continue(log_q)
            if not bool(alive.any()):
                break
        columns = log_q.argmax(-1)
        if uniform is not None:
            q = log_q.exp()
            if greedy is not None:
                q = torch.where(greedy[:, None], torch.zeros_like(q).scatter_(-1, columns[:, None], 1.0), q)
            columns = draw(q, upload(uniform(level, 1)[:, 0], q.device))
            probs.append(q)
        if stop is not None:
            stop.drawn(log_q, columns)
        lengths += 1 if stop is None else alive.cpu().long()
        tokens.append(target_ids(columns, expander.vocabulary))
        if level + 1 < depth:
            above = torch.full((batch, 1), level - 1, device=logits.device)
            logits = expander.expand(tokens[-1][:, None], above)[:, 0]
    if uniform is None:
        return DraftTree(torch.stack(tokens, 1), lengths, kind=DraftKind.FIXED)
    kind = DraftKind.WITH_REPLACEMENT
    return DraftTree(torch.stack(tokens, 1), lengths, None, torch.stack(probs, 1), expander.vocabulary, kind)
