"""Micro-batches packed without padding: each prompt once, with all of its samples, up to a token budget."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch


@dataclass(frozen=True, slots=True)
class Sample:
    """A completion to compute; ``index`` is its index in the caller's list."""

    index: int
    tokens: Sequence[int]


@dataclass(frozen=True, slots=True)
class PromptRow:
    """A prompt with its samples. The prompt is computed once; each sample attends to it and to itself."""

    prompt: Sequence[int]
    samples: tuple[Sample, ...]

    @property
    def length(self) -> int:
        """The number of tokens of the prompt and its samples."""
        return len(self.prompt) + sum(len(s.tokens) for s in self.samples)


@dataclass(frozen=True, slots=True)
class Segments:
    """Each prompt and each sample as a sequence of queries of its own, in the order of the packed sequence.

    Attributes:
        keys: The index in the packed sequence of each key, int64 [K]: a prompt's own tokens, and for a sample
            those of its prompt and its own.
        query_ends: The end of each sequence's queries, int32 [S + 1], from 0 on.
        key_ends: The end of each sequence's keys, int32 [S + 1], from 0 on.
        most_queries: The number of queries of the longest sequence.
        most_keys: The number of keys of the longest sequence.
    """

    keys: torch.Tensor
    query_ends: torch.Tensor
    key_ends: torch.Tensor
    most_queries: int
    most_keys: int


@dataclass(frozen=True)
class PackedBatch:
    """Rows of prompts and samples, concatenated to one sequence of T tokens.

    Attributes:
        members: The index of each sample, in order.
        lengths: For each prompt, its number of tokens and those of its samples.
        tokens: Token ids, int64 [T].
        positions: The position of each token in its own text, int64 [T]; a sample continues its prompt.
        pad_index: The index in the packed sequence of each row's tokens, int64 [n, L]; 0 is padding.
        flat_index: The index of each token in the padded [n * L] layout, int64 [T]: the inverse of
            ``pad_index``.
        pad_positions: ``positions`` in the padded layout, int64 [n, L].
        pad_labels: Whose tokens the padded layout holds, int64 [n, L]: 0 for the prompt, from 1 on for its
            samples, −1 for padding.
        predict: The index in the packed sequence of the token before each target, int64 [M].
        targets: The samples' token ids, int64 [M].
        owner: The index into ``members`` of the sample that each target belongs to, int64 [M].
    """

    members: tuple[int, ...]
    lengths: tuple[tuple[int, ...], ...]
    tokens: torch.Tensor
    positions: torch.Tensor
    pad_index: torch.Tensor
    flat_index: torch.Tensor
    pad_positions: torch.Tensor
    pad_labels: torch.Tensor
    predict: torch.Tensor
    targets: torch.Tensor
    owner: torch.Tensor

    @functools.cached_property
    def visible(self) -> torch.Tensor:
        """Which keys each query may attend to, bool [n, L, L]; for attention on the padded layout."""
        return _visible(self.pad_labels, self.pad_positions)

    @functools.cached_property
    def segments(self) -> Segments:
        """The prompts and samples as sequences of their own; for attention without padding."""
        keys, queries, lengths, at = [], [], [], 0
        for prompt, *samples in self.lengths:
            start = at
            for count in (prompt, *samples):
                before = [torch.arange(start, start + prompt)] if at > start else []
                keys += [*before, torch.arange(at, at + count)]
                queries.append(count)
                lengths.append(count + (prompt if before else 0))
                at += count
        device = self.tokens.device
        ends = (torch.tensor([0, *x]).cumsum(0).to(device, torch.int32) for x in (queries, lengths))
        return Segments(torch.cat(keys).to(device), *ends, max(queries), max(lengths))

    def to(self, device: torch.device) -> PackedBatch:
        """Returns the batch with its tensors on ``device``."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        moved = {name: x.to(device) for name, x in values.items() if isinstance(x, torch.Tensor)}
        return PackedBatch(**values | moved)


def plan(rows: Sequence[PromptRow], budget: int) -> list[list[PromptRow]]:
    """Distributes rows over micro-batches of at most ``budget`` tokens.

    Rows that are longer than the budget are split, and their prompt is repeated. Rows of similar length go
    together. Every sample occurs exactly once; one that exceeds the budget with its prompt gets a micro-batch
    of its own.
    """
    pieces = sorted((piece for row in rows for piece in _split(row, budget)), key=lambda row: -row.length)
    bins: list[list[PromptRow]] = []
    room = 0
    for piece in pieces:
        if not bins or piece.length > room:
            bins.append([])
            room = budget
        bins[-1].append(piece)
        room -= piece.length
    return bins


def _split(row: PromptRow, budget: int) -> list[PromptRow]:
    chunks: list[list[Sample]] = []
    room = 0
    for sample in sorted(row.samples, key=lambda s: -len(s.tokens)):
        if not chunks or len(sample.tokens) > room:
            chunks.append([])
            room = budget - len(row.prompt)
        chunks[-1].append(sample)
        room -= len(sample.tokens)
    return [PromptRow(row.prompt, tuple(chunk)) for chunk in chunks]


def pack(rows: Sequence[PromptRow]) -> PackedBatch:
    """Concatenates rows to one packed batch.

    Raises:
        ValueError: when a prompt or a sample is empty, which leaves no token to predict from or to predict.
    """
    tokens: list[int] = []
    positions: list[int] = []
    predict: list[int] = []
    targets: list[int] = []
    owner: list[int] = []
    members: list[int] = []
    segments: list[torch.Tensor] = []
    for row in rows:
        if not row.prompt or any(not s.tokens for s in row.samples):
            raise ValueError("a packed row needs a prompt and samples of at least one token each")
        prompt_end = len(tokens) + len(row.prompt) - 1
        tokens += row.prompt
        positions += range(len(row.prompt))
        labels = [0] * len(row.prompt)
        for number, sample in enumerate(row.samples, start=1):
            start = len(tokens)
            predict += [prompt_end, *range(start, start + len(sample.tokens) - 1)]
            targets += sample.tokens
            owner += [len(members)] * len(sample.tokens)
            members.append(sample.index)
            tokens += sample.tokens
            positions += range(len(row.prompt), len(row.prompt) + len(sample.tokens))
            labels += [number] * len(sample.tokens)
        segments.append(torch.tensor(labels))
    line_positions = torch.tensor(positions)
    pad_index, inside = _padded_layout([row.length for row in rows])
    pad_positions = line_positions[pad_index]
    return PackedBatch(
        members=tuple(members),
        lengths=tuple((len(row.prompt), *(len(s.tokens) for s in row.samples)) for row in rows),
        tokens=torch.tensor(tokens),
        positions=line_positions,
        pad_index=pad_index,
        flat_index=inside.flatten().nonzero()[:, 0],
        pad_positions=pad_positions,
        pad_labels=torch.nn.utils.rnn.pad_sequence(segments, batch_first=True, padding_value=-1),
        predict=torch.tensor(predict),
        targets=torch.tensor(targets),
        owner=torch.tensor(owner),
    )


def _padded_layout(lengths: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the index in the packed sequence, and whether it is a real token, both [n, L]."""
    starts = torch.tensor([0, *lengths[:-1]]).cumsum(0)
    column = torch.arange(max(lengths))
    inside = column < torch.tensor(lengths)[:, None]
    return torch.where(inside, starts[:, None] + column, 0), inside


def _visible(segments: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Returns the attention mask: causal within a sample, and from a sample to its prompt (segment 0).

    Padding (−1) attends to itself, so that its softmax is finite.
    """
    queries, keys = segments[:, :, None], segments[:, None, :]
    same = (keys == queries) | ((keys == 0) & (queries > 0))
    causal = positions[:, None, :] <= positions[:, :, None]
    return (same & causal & (keys >= 0)) | torch.eye(
        segments.shape[1], dtype=torch.bool, device=segments.device
    )
