"""Micro-batches packed without padding: each prompt once, with all of its samples, up to a token budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Sample:
    """A completion to score; ``index`` is its place in the caller's list."""

    index: int
    tokens: Sequence[int]


@dataclass(frozen=True, slots=True)
class PromptRow:
    """A prompt and samples of it. The prompt is computed once; each sample attends to it and to itself."""

    prompt: Sequence[int]
    samples: tuple[Sample, ...]

    @property
    def length(self) -> int:
        return len(self.prompt) + sum(len(s.tokens) for s in self.samples)


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """Rows of prompts and samples, end to end in one line of T tokens.

    Attributes:
        members: Index of each sample, in order.
        tokens: int64 [T].
        positions: int64 [T], position of each token in its own sequence (a sample goes on where its prompt
            ends).
        pad_index: int64 [n, L], place of each row's tokens in the line (0 where a row is shorter than L).
        flat_index: int64 [T], place of each token in the padded [n * L] layout: the inverse of ``pad_index``.
        pad_positions: int64 [n, L], ``positions`` in the padded layout.
        visible: bool [n, L, L], which keys each query may attend to.
        predict: int64 [M], place in the line of the token before each target.
        targets: int64 [M], the samples' tokens.
        owner: int64 [M], index into ``members`` of the sample each target belongs to.
    """

    members: tuple[int, ...]
    tokens: torch.Tensor
    positions: torch.Tensor
    pad_index: torch.Tensor
    flat_index: torch.Tensor
    pad_positions: torch.Tensor
    visible: torch.Tensor
    predict: torch.Tensor
    targets: torch.Tensor
    owner: torch.Tensor

    def to(self, device: torch.device) -> PackedBatch:
        """The same batch with its tensors on ``device``."""
        moved = {name: getattr(self, name).to(device) for name in self.__slots__ if name != "members"}
        return PackedBatch(members=self.members, **moved)


def plan(rows: Sequence[PromptRow], budget: int) -> list[list[PromptRow]]:
    """Splits rows longer than ``budget`` (repeating their prompt) and fills micro-batches of at most
    ``budget`` tokens.

    Rows of similar length go together. Every sample occurs exactly once; one that is too long with its prompt
    alone gets a micro-batch of its own.
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
    """Lays rows out in one line.

    Raises:
        ValueError: when a prompt or a sample is empty: there would be no token to predict from, or none to
            predict.
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
        tokens=torch.tensor(tokens),
        positions=line_positions,
        pad_index=pad_index,
        flat_index=inside.flatten().nonzero()[:, 0],
        pad_positions=pad_positions,
        visible=_visible(
            torch.nn.utils.rnn.pad_sequence(segments, batch_first=True, padding_value=-1), pad_positions
        ),
        predict=torch.tensor(predict),
        targets=torch.tensor(targets),
        owner=torch.tensor(owner),
    )


def _padded_layout(lengths: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """(place in the line, whether it is a real token), both [n, L]."""
    starts = torch.tensor([0, *lengths[:-1]]).cumsum(0)
    column = torch.arange(max(lengths))
    inside = column < torch.tensor(lengths)[:, None]
    return torch.where(inside, starts[:, None] + column, 0), inside


def _visible(segments: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Causal within a sample, and from a sample to its prompt (segment 0). Padding (−1) sees itself, so that
    its softmax exists.
    """
    queries, keys = segments[:, :, None], segments[:, None, :]
    same = (keys == queries) | ((keys == 0) & (queries > 0))
    causal = positions[:, None, :] <= positions[:, :, None]
    return (same & causal & (keys >= 0)) | torch.eye(segments.shape[1], dtype=torch.bool)
