"""Reading the known tokens of sequences that were just admitted."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch

from rollout.model_runner import Chunk, ModelRunner
from rollout.sequence import SequenceState


def prefill(runner: ModelRunner, admitted: Sequence[tuple[int, SequenceState]], most: int) -> torch.Tensor:
    """Reads each one's tokens into its slot; the samples of one prompt share a reading.

    Args:
        runner: Its cache has room.
        admitted: (slot, sequence).
        most: Tokens that one forward reads.

    Returns:
        Logits [len(admitted), V] after each one's last token.
    """
    readers: dict[tuple[int, ...], list[int]] = {}
    first_kept: dict[int, int] = {}
    for slot, sequence in admitted:
        readers.setdefault(tuple(sequence.tokens), []).append(slot)
        first_kept[slot] = sequence.num_prompt - 1
    last: dict[int, torch.Tensor] = {}
    chunks = [Chunk(slots[0], tokens, 0, first_kept[slots[0]]) for tokens, slots in readers.items()]
    for pieces in split_prefill(chunks, most):
        last.update({piece.slot: row for piece, row in zip(pieces, runner.prefill(pieces), strict=True)})
    for tokens, slots in readers.items():
        if len(slots) > 1:
            runner.cache.copy_slot(slots[0], slots[1:], len(tokens))
    return torch.stack([last[readers[tuple(sequence.tokens)][0]] for _, sequence in admitted])


def split_prefill(chunks: Iterable[Chunk], most: int) -> Iterator[list[Chunk]]:
    """Batches of chunks of at most ``most`` tokens together, in order; a chunk that does not fit is cut."""
    batch: list[Chunk] = []
    room = most
    for chunk in chunks:
        at = 0
        while at < len(chunk.tokens):
            piece = chunk.tokens[at : at + room]
            batch.append(Chunk(chunk.slot, piece, chunk.start + at, chunk.head_from))
            at, room = at + len(piece), room - len(piece)
            if room == 0:
                yield batch
                batch, room = [], most
    if batch:
        yield batch
