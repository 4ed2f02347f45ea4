"""Draft chains: one token after another, for as long as a stop policy wants."""

from __future__ import annotations

from typing import Protocol

import torch

from paceline.rollout.sampling import draw
from paceline.rollout.trees.draft_tree import DraftKind, DraftTree
from paceline.rollout.trees.expander import Expander, Uniform, log_probs, target_ids


class StopPolicy(Protocol):
    """Decides before each draft token but the first whether it is drawn.

    It may look at the drafter's distribution for it, and at the tokens before it; never at the token itself,
    which would leave those that are kept with another distribution than was reported.
    """

    def begin(self, batch: int) -> None:
        """A new draft of ``batch`` rows."""
        ...

    def should_continue(self, log_q: torch.Tensor) -> torch.Tensor:
        """bool [B]: which rows draw their next token, given its log-probs float32 [B, W]."""
        ...

    def drawn(self, log_q: torch.Tensor, columns: torch.Tensor) -> None:
        """The tokens int64 [B] that were drawn from it."""
        ...


def grow_chain(
    expander: Expander,
    depth: int,
    uniform: Uniform | None = None,
    greedy: torch.Tensor | None = None,
    stop: StopPolicy | None = None,
) -> DraftTree:
    """A chain of up to ``depth`` tokens for each row.

    Args:
        expander: The drafter.
        depth: Most tokens.
        uniform: The step's numbers, to draw from the drafter's distribution; None takes the likeliest token
            each time, a function of what is committed.
        greedy: bool [B], rows that take the likeliest token even so (it is then all of the distribution it
            was drawn from).
        stop: When to end earlier; None never does.
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
            columns = draw(q, uniform(level, 1)[:, 0])
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
