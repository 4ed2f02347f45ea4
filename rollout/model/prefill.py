"""Reading the known tokens of sequences that were just admitted."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch

from paceline.rollout.engine.kept_prefixes import KeptPrefixes
from paceline.rollout.model.runner import Chunk, ModelRunner
from paceline.rollout.sequence import SequenceState


class PromptLogits:
    """Logits after the prompts that sequences in flight have read. A sample that is admitted later than its
    siblings need not read
    again: its keys are in their slots.
    """

    def __init__(self) -> None:
        self._logits: dict[tuple[int, ...], torch.Tensor] = {}

    def held(self, active: Sequence[SequenceState]) -> dict[tuple[int, ...], tuple[int, torch.Tensor]]:
        """Prompts of active sequences that are known: a slot that has their keys, and the logits [V]. Forgets
        all others.
        """
        slots = {tuple(s.tokens[: s.num_prompt]): slot for slot, s in enumerate(active)}
        self._logits = {tokens: row for tokens, row in self._logits.items() if tokens in slots}
        return {tokens: (slots[tokens], row) for tokens, row in self._logits.items()}

    def keep(self, admitted: Sequence[tuple[int, SequenceState]], logits: torch.Tensor) -> None:
        """Remembers what `prefill` gave for those that had read nothing but their prompts."""
        for (_, sequence), row in zip(admitted, logits, strict=True):
            if len(sequence.tokens) == sequence.num_prompt:
                self._logits.setdefault(tuple(sequence.tokens), row.clone())

    def clear(self) -> None:
        """No sequence is in flight any more."""
        self._logits.clear()


def prefill(
    runner: ModelRunner,
    admitted: Sequence[tuple[int, SequenceState]],
    most: int,
    held: Mapping[tuple[int, ...], tuple[int, torch.Tensor]],
    active: Sequence[SequenceState] = (),
    kept: KeptPrefixes | None = None,
) -> torch.Tensor:
    """Reads each one's tokens into its slot; the samples of one prompt share a reading, also with those
    admitted before, and what branches off from a sequence in flight, or begins like one of an earlier call
    that is kept, is copied from it.

    Args:
        runner: Its cache has room.
        admitted: (slot, sequence).
        most: Tokens that one forward reads.
        held: From `PromptLogits.held`.
        active: Sequences in the first slots, admitted before.
        kept: Of earlier calls.

    Returns:
        Logits [len(admitted), V] after each one's last token.
    """
    readers: dict[tuple[int, ...], list[int]] = {}
    sequences = dict(admitted)
    for slot, sequence in admitted:
        readers.setdefault(tuple(sequence.tokens), []).append(slot)
    last: dict[int, torch.Tensor] = {}
    chunks = []
    for tokens, slots in readers.items():
        if tokens in held:
            continue
        reader = sequences[slots[0]]
        start = _copy_beginning(runner, reader, slots[0], active, kept)
        reader.stats.prefilled += len(tokens) - start
        chunks.append(Chunk(slots[0], tokens[start:], start, reader.num_prompt - 1))
    for pieces in split_prefill(chunks, most):
        last.update({piece.slot: row for piece, row in zip(pieces, runner.prefill(pieces), strict=True)})
    for tokens, slots in readers.items():
        source, copies = (held[tokens][0], slots) if tokens in held else (slots[0], slots[1:])
        if copies:
            runner.cache.copy_slot(source, copies, len(tokens))
        if tokens in held:
            last[slots[0]] = held[tokens][1]
    return torch.stack([last[readers[tuple(sequence.tokens)][0]] for _, sequence in admitted])


def _copy_beginning(
    runner: ModelRunner,
    sequence: SequenceState,
    slot: int,
    active: Sequence[SequenceState],
    kept: KeptPrefixes | None,
) -> int:
    """Copies into a sequence's slot as much of its beginning as there is elsewhere. Returns how many tokens
    that was.
    """
    source, start = _longest_beginning(sequence.tokens, sequence.num_prompt, active)
    restored = kept.restore(sequence, slot, start) if kept is not None else 0
    if start and not restored:
        runner.cache.copy_slot(source, [slot], start)
    return restored or start


def _longest_beginning(
    tokens: Sequence[int], num_prompt: int, active: Sequence[SequenceState]
) -> tuple[int, int]:
    """The slot that holds most of what a sequence begins with, and how much; 0 where that is no more than its
    prompt.
    """
    best = 0, 0
    for slot, other in enumerate(active):
        most = min(len(tokens), len(other.tokens)) - 1  # the last token is yet to be read
        if (
            len(tokens) == num_prompt
            or most <= max(best[1], num_prompt)
            or other.tokens[:num_prompt] != list(tokens[:num_prompt])
        ):
            continue
        same = next((i for i in range(num_prompt, most) if other.tokens[i] != tokens[i]), most)
        if same > max(best[1], num_prompt):
            best = slot, same
    return best


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
