"""Records what the target would have said after draft tokens that verification rejected."""

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
    """Adds each sequence's first rejected token to its record. Call before accepted paths are moved.

    Args:
        active: B sequences, in slots 0 … B − 1, as they were when the draft was made.
        draft: What was verified.
        paths: Nodes kept of each.
        taps: [slots, span, width] of the cache, the last ``hidden_size`` of a place what the head read there.
        hidden_size: Of the target.
    """
    for row, (sequence, path) in enumerate(zip(active, paths, strict=True)):
        node = _first_rejected(draft, row, path)
        if node is not None:
            final = taps[row, len(sequence.tokens) + node, -hidden_size:].clone()
            sequence.rejections.append(
                Rejection(len(sequence.tokens) + len(path), int(draft.tokens[row, node]), final)
            )


def _first_rejected(draft: DraftTree, row: int, path: Sequence[int]) -> int | None:
    """The first child of the last node kept; a drafter's first is its likeliest."""
    length = int(draft.lengths[row])
    if draft.parents is None:
        return len(path) if len(path) < length else None
    last = path[-1] if path else -1
    children = (draft.parents[row, :length] == last).nonzero()
    return int(children[0]) if len(children) else None
