"""Prefill: reads the known tokens of newly admitted sequences."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch

from paceline.rollout.model.kept_prefixes import KeptPrefixes
from paceline.rollout.model.runner import Chunk, ModelRunner
from paceline.rollout.sequence import SequenceState


class PromptLogits:
    """Remembers the logits after the prompts of sequences in flight.

    With them, a sample admitted later than its siblings need not read the prompt again: its keys are in their
    slots.
    """

    def __init__(self) -> None:
        self._logits: dict[tuple[int, ...], torch.Tensor] = {}

    def held(self, active: Sequence[SequenceState]) -> dict[tuple[int, ...], tuple[int, torch.Tensor]]:
        """Returns the remembered prompts of active sequences and forgets all others.

        Returns:
            Prompt → (slot that holds its keys, logits [V] after it).
        """
        slots = {tuple(s.tokens[: s.num_prompt]): slot for slot, s in enumerate(active)}
        self._logits = {tokens: row for tokens, row in self._logits.items() if tokens in slots}
        return {tokens: (slots[tokens], row) for tokens, row in self._logits.items()}

    def keep(self, admitted: Sequence[tuple[int, SequenceState]], logits: torch.Tensor) -> None:
        """Remembers the logits from `prefill` for sequences that have read nothing but their prompts."""
        for (_, sequence), row in zip(admitted, logits, strict=True):
            if len(sequence.tokens) == sequence.num_prompt:
                self._logits.setdefault(tuple(sequence.tokens), row.clone())

    def clear(self) -> None:
        """Forgets all prompts, when no sequence is in flight any more."""
        self._logits.clear()


def prefill(
    runner: ModelRunner,
    admitted: Sequence[tuple[int, SequenceState]],
    most: int,
    held: Mapping[tuple[int, ...], tuple[int, torch.Tensor]],
    active: Sequence[SequenceState] = (),
    kept: KeptPrefixes | None = None,
) -> torch.Tensor:
    """Reads each admitted sequence's tokens into its slot, and copies shared prefixes where it can.

    Samples of one prompt share one reading, also with sequences admitted before. A sequence that branches off
    from one in flight, or shares a prefix with a kept sequence of an earlier call, has that prefix copied.

    Args:
        runner: Runner whose cache has room.
        admitted: Pairs (slot, sequence).
        most: Maximum number of tokens that one forward reads.
        held: Result of `PromptLogits.held`.
        active: Sequences in the first slots, admitted before.
        kept: Prefixes kept from earlier calls; None for none.

    Returns:
        Logits after the last token of each admitted sequence, [len(admitted), V].
    """
    slots_by_tokens: dict[tuple[int, ...], list[int]] = {}
    sequences = dict(admitted)
    for slot, sequence in admitted:
        slots_by_tokens.setdefault(tuple(sequence.tokens), []).append(slot)
    last_logits: dict[int, torch.Tensor] = {}
    chunks = []
    for tokens, slots in slots_by_tokens.items():
        if tokens in held:
            continue
        reader = sequences[slots[0]]
        start = _copy_shared_prefix(runner, reader, slots[0], active, kept)
        reader.stats.prefilled += len(tokens) - start
        chunks.append(Chunk(slots[0], tokens[start:], start, reader.num_prompt - 1))
    for pieces in split_prefill(chunks, most):
        last_logits.update(
            {piece.slot: row for piece, row in zip(pieces, runner.prefill(pieces), strict=True)}
        )
    for tokens, slots in slots_by_tokens.items():
        source, copies = (held[tokens][0], slots) if tokens in held else (slots[0], slots[1:])
        if copies:
            runner.cache.copy_slot(source, copies, len(tokens))
        if tokens in held:
            last_logits[slots[0]] = held[tokens][1]
    return torch.stack([last_logits[slots_by_tokens[tuple(sequence.tokens)][0]] for _, sequence in admitted])


def _copy_shared_prefix(
    runner: ModelRunner,
    sequence: SequenceState,
    slot: int,
    active: Sequence[SequenceState],
    kept: KeptPrefixes | None,
) -> int:
    """Copies the longest prefix available elsewhere into a sequence's slot; returns its number of tokens."""
    source, start = _longest_shared_prefix(sequence.tokens, sequence.num_prompt, active)
    restored = kept.restore(sequence, slot, start) if kept is not None else 0
    if start and not restored:
        runner.cache.copy_slot(source, [slot], start)
    return restored or start


def _longest_shared_prefix(
    tokens: Sequence[int], num_prompt: int, active: Sequence[SequenceState]
) -> tuple[int, int]:
    """Finds the active sequence with the longest shared prefix.

    Returns:
        Its slot and the length of the prefix; (0, 0) if no prefix is longer than the prompt.
    """
    best = 0, 0
    for slot, other in enumerate(active):
        most = min(len(tokens), len(other.tokens)) - 1  # the last token has not been read yet
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
    """Yields batches of chunks with at most ``most`` tokens each, in order; splits chunks that do not fit."""
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
