"""Records the target's hidden states after draft tokens that verification rejected."""

from __future__ import annotations

from collections.abc import Sequence

from paceline.rollout.engine.batch_verification import BatchOutcome
from paceline.rollout.model.kv_cache import SlotCache
from paceline.rollout.model.paged_cache import PagedCache
from paceline.rollout.native import upload
from paceline.rollout.sequence import Rejection, SequenceState
from paceline.rollout.trees import DraftTree


def record_rejections(
    active: Sequence[SequenceState],
    draft: DraftTree,
    outcome: BatchOutcome,
    cache: SlotCache | PagedCache,
    hidden_size: int,
) -> None:
    """Adds each sequence's first rejected token to its record.

    Call this before accepted paths are moved in the cache.

    Args:
        active: B sequences in slots 0 … B − 1, in the state in which the draft was made.
        draft: Draft that was verified, with parents on the CPU.
        outcome: Outcome of the verification.
        cache: Cache whose taps end with the input of the output head, ``hidden_size`` values.
        hidden_size: Hidden size of the target.
    """
    lengths = draft.lengths.tolist()
    nodes = [_first_rejected(draft, row, lengths[row], path) for row, path in enumerate(outcome.paths)]
    rejected = [(row, node) for row, node in enumerate(nodes) if node is not None]
    if not rejected:
        return
    places = upload([[row, len(active[row].tokens) + node] for row, node in rejected], cache.device)
    finals = cache.taps_at(places[:, 0], places[:, 1])[:, -hidden_size:]
    for (row, node), final in zip(rejected, finals, strict=True):
        sequence = active[row]
        position = len(sequence.tokens) + len(outcome.paths[row])
        sequence.rejections.append(Rejection(position, int(outcome.drafted[row, node]), final))


def _first_rejected(draft: DraftTree, row: int, length: int, path: Sequence[int]) -> int | None:
    """Returns the first child of the last accepted node, or None if it has no children.

    A drafter lists a node's most likely child first.
    """
    if draft.parents is None:
        return len(path) if len(path) < length else None
    last_accepted = path[-1] if path else -1
    children = (draft.parents[row, :length] == last_accepted).nonzero()
    return int(children[0]) if len(children) else None
