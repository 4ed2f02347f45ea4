"""Records the target's hidden states after draft tokens that verification rejected."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from paceline.rollout.sequence import Rejection, SequenceState
from paceline.rollout.trees import DraftTree


def record_rejections(
    active: Sequence[SequenceState],
    draft: DraftTree,
    paths: Sequence[Sequence[int]],
    taps: torch.Tensor,
    hidden_size: int,
) -> None:
    """Adds each sequence's first rejected token to its record.

    Call this before accepted paths are moved in the cache.

    Args:
        active: B sequences in slots 0 … B − 1, in the state in which the draft was made.
        draft: Draft that was verified.
        paths: Accepted nodes of each sequence.
        taps: Taps of the cache, [slots, span, width]; the last ``hidden_size`` values at a place are the
            input of the output head there.
        hidden_size: Hidden size of the target.
    """
    for row, (sequence, path) in enumerate(zip(active, paths, strict=True)):
        node = _first_rejected(draft, row, path)
        if node is not None:
            final = taps[row, len(sequence.tokens) + node, -hidden_size:].clone()
            sequence.rejections.append(
                Rejection(len(sequence.tokens) + len(path), int(draft.tokens[row, node]), final)
            )


def _first_rejected(draft: DraftTree, row: int, path: Sequence[int]) -> int | None:
    """Returns the first child of the last accepted node, or None if it has no children.

    A drafter lists a node's most likely child first.
    """
    length = int(draft.lengths[row])
    if draft.parents is None:
        return len(path) if len(path) < length else None
    last_accepted = path[-1] if path else -1
    children = (draft.parents[row, :length] == last_accepted).nonzero()
    return int(children[0]) if len(children) else None
