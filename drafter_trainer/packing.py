"""Pieces of traces side by side in one row, without padding between them and without attention across
them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from paceline.drafter_trainer.trace_buffer import Piece

_CHUNK = 256


@dataclass(frozen=True, slots=True)
class DraftBatch:
    """N anchors of several pieces. The anchor at position a of a text reads the features there and token a +
    1.

    Every piece has a block of ``anchors + 1 + unroll`` tokens, padded with 0 past its text's end, in T tokens
    altogether.

    Attributes:
        tokens: int64 [T].
        at: int64 [N], where each anchor's own token is among them.
        positions: int64 [N], of the anchors in their texts.
        pieces: int64 [N], which piece an anchor belongs to.
        taps: float32 [N, taps * hidden].
        weights: float32 [N].
        teacher: float32 [T, W], the target's probabilities of the draft vocabulary *after* each token.
        trained: bool [T], whether that distribution is known (it produced a completion token).
        refused: bool [T], whether it produced a token where verification had refused a draft.
        aside: int64 [D, 2], for each refused token an anchor whose first drafted token it would be, and that
            token.
        aside_teacher: float32 [D, W], the target's probabilities after it.
    """

    tokens: torch.Tensor
    at: torch.Tensor
    positions: torch.Tensor
    pieces: torch.Tensor
    taps: torch.Tensor
    weights: torch.Tensor
    teacher: torch.Tensor
    trained: torch.Tensor
    refused: torch.Tensor
    aside: torch.Tensor
    aside_teacher: torch.Tensor

    def attends(self) -> torch.Tensor:
        """bool [N, N]: anchors attend to those of their own piece that are not after them."""
        same = self.pieces[:, None] == self.pieces[None]
        return same & (self.positions[:, None] >= self.positions[None])


@torch.no_grad()
def pack(
    pieces: Sequence[Piece],
    weights: Sequence[float],
    head: nn.Module,
    vocabulary: torch.Tensor,
    temperature: float,
    unroll: int,
    device: torch.device,
) -> DraftBatch:
    """Lays pieces side by side and computes the teacher's distribution from the stored head inputs: no
    forward of the target is run.

    Args:
        pieces: Of one micro-batch.
        weights: How much the anchors of each count.
        head: The target's output head, as it was when the traces were made.
        vocabulary: int64 [W], the draft vocabulary.
        temperature: Of the rollouts.
        unroll: Draft positions trained on.
        device: Of the drafter.
    """
    blocks: list[dict[str, torch.Tensor]] = []
    base = anchors = 0
    for number, (piece, weight) in enumerate(zip(pieces, weights, strict=True)):
        blocks.append(_block(piece, number, weight, base, anchors, unroll))
        base, anchors = base + len(blocks[-1]["tokens"]), anchors + len(blocks[-1]["at"])
    joined = {name: torch.cat([block[name].to(device) for block in blocks]) for name in blocks[0]}
    finals = torch.cat([joined.pop("final"), joined.pop("aside_final")])
    known = torch.cat([teacher_probs(head, f, vocabulary, temperature) for f in finals.split(_CHUNK)])
    teacher = torch.zeros(base, len(vocabulary), device=device)
    of_path = len(known) - len(joined["aside"])
    teacher[joined["trained"]] = known[:of_path]
    return DraftBatch(**joined, teacher=teacher, aside_teacher=known[of_path:])


def _block(
    piece: Piece, number: int, weight: float, base: int, anchors: int, unroll: int
) -> dict[str, torch.Tensor]:
    """One piece's part of every field of a batch, and of the inputs of the target's head where the teacher is
    known.
    """
    trace, length = piece.entry.trace.get(), piece.end - piece.begin
    count = length + 1 + unroll
    first, end = max(trace.num_prompt - 1, piece.begin), min(len(trace.token_ids) - 1, piece.begin + count)
    trained = torch.zeros(count, dtype=torch.bool)
    trained[first - piece.begin : max(end - piece.begin, 0)] = True
    # an anchor drafts the token two after it; the one at block index i produces the token at i + 1
    drafted_by = trace.refused[:, 0] - 2 - piece.begin
    inside = (drafted_by >= 0) & (drafted_by < length)
    refused = torch.zeros(count, dtype=torch.bool)
    refused[drafted_by[inside] + 1] = True
    return {
        "tokens": _padded(trace.token_ids[piece.begin :], count),
        "at": base + torch.arange(length),
        "positions": torch.arange(piece.begin, piece.end),
        "pieces": torch.full((length,), number),
        "taps": trace.taps[piece.begin : piece.end].float(),
        "weights": torch.full((length,), weight),
        "trained": trained,
        "refused": refused,
        "final": trace.final[first : max(end, first)],
        "aside": torch.stack([anchors + drafted_by[inside], trace.refused[inside, 1]], dim=1),
        "aside_final": trace.refused_final[inside],
    }


def _padded(values: torch.Tensor, count: int) -> torch.Tensor:
    """The first ``count`` values, then zeros."""
    return torch.nn.functional.pad(values[:count], (0, count - len(values[:count])))


def teacher_probs(
    head: nn.Module, final: torch.Tensor, vocabulary: torch.Tensor, temperature: float
) -> torch.Tensor:
    """The target's probabilities of the draft vocabulary: [M, hidden] → float32 [M, W]. Its own softmax runs
    over all tokens.

    The engine's traces may be of another precision than the head, which is the trainer's.
    """
    logits = head(final.to(next(head.parameters()).dtype)).float() / temperature
    return torch.exp(logits[:, vocabulary] - torch.logsumexp(logits, dim=-1, keepdim=True))
