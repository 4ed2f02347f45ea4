"""Packs pieces of traces into one row, without padding or attention between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from paceline.drafter_trainer.teacher import Teacher
from paceline.drafter_trainer.trace_buffer import Piece
from paceline.rollout.drafters.eagle3_model import SINKS


@dataclass(frozen=True, slots=True)
class LeftContext:
    """C tokens before the anchors of their pieces, which anchors attend to and nothing is drafted from.

    Attributes:
        tokens: int64 [C], the token *after* each, which the drafter reads beside its features.
        positions: int64 [C], position of each in its text; ascending within a piece.
        taps: float32 [C, taps * hidden], the target's hidden states that the drafter reads.
        counts: Number of tokens before the anchors of each piece, in the order of the pieces.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    taps: torch.Tensor
    counts: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class DraftBatch:
    """A micro-batch of N anchors from P pieces.

    The anchor at position a of a text reads the features at a and token a + 1. Every piece has a block of
    ``anchors + 1 + unroll`` tokens, padded with 0 past the end of its text; the blocks hold T tokens in
    total.

    Attributes:
        tokens: int64 [T], token ids of all blocks.
        anchor_index: int64 [N], index into ``tokens`` of the token at each anchor's position.
        positions: int64 [N], position of each anchor in its text.
        pieces: int64 [N], index of the piece that each anchor belongs to; ascending.
        taps: float32 [N, taps * hidden], the target's hidden states that the drafter reads.
        weights: float32 [N], loss weight of each anchor.
        teacher: float32 [T, W], the target's probabilities of the draft vocabulary *after* each token.
        trained: bool [T], whether that distribution is known, which is where it produced a completion token.
        rejected: bool [T], whether it produced a token at a place where verification rejected a draft.
        rejected_drafts: int64 [D, 2], for each rejected token the anchor whose first draft token it would be,
            and the token.
        rejected_teacher: float32 [D, W], the target's probabilities after each rejected token.
        counts: Number of anchors of each piece.
        context: What comes before the anchors.
    """

    tokens: torch.Tensor
    anchor_index: torch.Tensor
    positions: torch.Tensor
    pieces: torch.Tensor
    taps: torch.Tensor
    weights: torch.Tensor
    teacher: torch.Tensor
    trained: torch.Tensor
    rejected: torch.Tensor
    rejected_drafts: torch.Tensor
    rejected_teacher: torch.Tensor
    counts: tuple[int, ...]
    context: LeftContext


@torch.no_grad()
def pack(
    pieces: Sequence[Piece],
    weights: Sequence[float],
    teacher: Teacher,
    unroll: int,
    context: int,
    device: torch.device,
    rejected: bool = False,
    offsets: Sequence[int] | None = None,
) -> DraftBatch:
    """Packs pieces into a batch and computes the teacher's distributions from the stored inputs of its head.

    No forward pass of the target is needed.

    A piece brings its left context: the ``context`` tokens before its first anchor, and the first four of the
    text, which stay visible at every distance. LongSpec (arXiv 2502.17421) keeps such attention sinks in
    training as well. Its anchor-offset indices draw a random distance between them and the rest, so that
    distances are met in training that no text of the step has; ``offsets`` are such distances.

    Args:
        pieces: Pieces of one micro-batch.
        weights: Loss weight of each piece's anchors.
        teacher: The target's distributions.
        unroll: Number of draft positions trained on.
        context: Number of tokens before a piece that its anchors attend to; 0 also leaves out the first four.
        device: The drafter's device.
        rejected: Whether the batch has the target's distributions after rejected tokens.
        offsets: What is added to the positions of each piece and its context, the first four tokens of the
            text aside; None adds nothing.
    """
    blocks: list[dict[str, torch.Tensor]] = []
    base = anchors = 0
    for number, (piece, weight) in enumerate(zip(pieces, weights, strict=True)):
        block = _block(piece, number, weight, base, anchors, unroll, rejected) | _context(piece, context)
        offset = 0 if offsets is None else offsets[number]
        block["positions"] += offset
        block["context_positions"][len(_sinks(piece, context)) :] += offset
        blocks.append(block)
        base, anchors = base + len(blocks[-1]["tokens"]), anchors + len(blocks[-1]["anchor_index"])
    joined = {name: torch.cat([block[name].to(device) for block in blocks]) for name in blocks[0]}
    left = LeftContext(
        tokens=joined.pop("context_tokens"),
        positions=joined.pop("context_positions"),
        taps=joined.pop("context_taps"),
        counts=tuple(len(block["context_tokens"]) for block in blocks),
    )
    probs = torch.zeros(base, len(teacher.vocabulary), device=device)
    taught = torch.cat([block["trained"] for block in blocks]).nonzero()[:, 0].to(device)
    spans = [(piece.entry.normalizers, _taught(piece, unroll)) for piece in pieces]
    probs[taught] = teacher.probs(joined.pop("final"), spans)
    after_rejected = joined.pop("rejected_final")
    return DraftBatch(
        **joined,
        teacher=probs,
        rejected_teacher=teacher.probs(after_rejected) if rejected else probs[:0],
        counts=tuple(piece.end - piece.begin for piece in pieces),
        context=left,
    )


def _context(piece: Piece, context: int) -> dict[str, torch.Tensor]:
    """Returns one piece's part of every tensor of `LeftContext`, each under its name after ``context_``."""
    trace, sinks = piece.entry.trace.get(), _sinks(piece, context)
    rest = torch.arange(max(piece.begin - context, len(sinks)), piece.begin)
    positions = torch.cat([sinks, rest])
    return {
        "context_tokens": trace.token_ids[positions + 1],
        "context_positions": positions,
        "context_taps": trace.taps[positions].float(),
    }


def _sinks(piece: Piece, context: int) -> torch.Tensor:
    """Returns the positions of the first tokens of the text that a piece has as its context."""
    return torch.arange(min(SINKS, piece.begin) if context else 0)


def _taught(piece: Piece, unroll: int) -> slice:
    """Returns the positions of a trace whose next token a piece's drafts may be compared with.

    Drafts start after the prompt, and those of the last anchors run past the piece.
    """
    first = max(piece.entry.trace.num_prompt - 1, piece.begin)
    end = min(piece.entry.trace.length - 1, piece.end + 1 + unroll)
    return slice(first, max(end, first))


def _block(
    piece: Piece, number: int, weight: float, base: int, anchors: int, unroll: int, rejected: bool
) -> dict[str, torch.Tensor]:
    """Returns one piece's part of every field of a batch, with the head inputs where the teacher is known.

    Args:
        piece: The piece.
        number: Its index in the batch.
        weight: Loss weight of its anchors.
        base: Number of tokens of the blocks before it.
        anchors: Number of anchors of the blocks before it.
        unroll: Number of draft positions trained on.
        rejected: Whether the target's distributions after rejected tokens are part of it.
    """
    trace, length, taught = piece.entry.trace.get(), piece.end - piece.begin, _taught(piece, unroll)
    count = length + 1 + unroll
    trained = torch.zeros(count, dtype=torch.bool)
    trained[taught.start - piece.begin : taught.stop - piece.begin] = True
    # An anchor's first draft token lies two positions after it. The distribution after token i of the block
    # produces token i + 1, so the rejection is marked one position after the anchor.
    drafted_by = trace.refused[:, 0] - 2 - piece.begin
    inside = (drafted_by >= 0) & (drafted_by < length)
    marks = torch.zeros(count, dtype=torch.bool)
    marks[drafted_by[inside] + 1] = True
    inside &= rejected
    return {
        "tokens": _padded(trace.token_ids[piece.begin :], count),
        "anchor_index": base + torch.arange(length),
        "positions": torch.arange(piece.begin, piece.end),
        "pieces": torch.full((length,), number),
        "taps": trace.taps[piece.begin : piece.end].float(),
        "weights": torch.full((length,), weight),
        "trained": trained,
        "rejected": marks,
        "final": trace.final[taught],
        "rejected_drafts": torch.stack([anchors + drafted_by[inside], trace.refused[inside, 1]], dim=1),
        "rejected_final": trace.refused_final[inside],
    }


def _padded(values: torch.Tensor, count: int) -> torch.Tensor:
    """Returns the first ``count`` values, followed by zeros if there are fewer."""
    return torch.nn.functional.pad(values[:count], (0, count - len(values[:count])))
