"""One verification of a batch: logits to the tokens that each sequence commits, and their log-probs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from rollout.randomness import Stream, uniforms
from rollout.sampling import processed_probs
from rollout.sequence import SequenceState
from rollout.trees.chain import DraftTree
from rollout.verify import ChainUniforms, Verification, verify_chain, verify_greedy


@dataclass(frozen=True, slots=True)
class BatchOutcome:
    """What one target forward decided, one entry a sequence.

    Attributes:
        accepted: Draft tokens kept.
        tokens: Kept draft tokens and the token after them.
        logprobs: Of those tokens, padded to the longest row.
        finite: Whether the logits were all usable; where not, the other entries mean nothing.
    """

    accepted: list[int]
    tokens: list[list[int]]
    logprobs: list[list[float]]
    finite: list[bool]


def verify_batch(sequences: Sequence[SequenceState], logits: torch.Tensor, draft: DraftTree) -> BatchOutcome:
    """Accepts or rejects each sequence's draft, by argmax when all are greedy.

    Args:
        sequences: B sequences.
        logits: [B, N + 1, V], after the last committed token and after each draft token.
        draft: A chain of N nodes.
    """
    params = [s.request.params for s in sequences]
    finite = torch.isfinite(logits.amax(-1)).all(-1).tolist()
    if all(p.greedy for p in params):
        probs = torch.softmax(logits.float(), dim=-1)
        outcome = verify_greedy(logits, draft)
    else:
        probs = processed_probs(logits, params)
        outcome = verify_chain(probs, draft, _uniforms(sequences, draft))
    tokens = _committed_tokens(draft, outcome)
    return BatchOutcome(outcome.accepted.tolist(), tokens, _logprobs(probs, logits, sequences, tokens), finite)


def _uniforms(sequences: Sequence[SequenceState], draft: DraftTree) -> ChainUniforms:
    seeds = np.array([s.request.seed for s in sequences])
    first = np.array([[len(s.tokens)] for s in sequences])
    depth, device = draft.tokens.shape[1], draft.tokens.device
    positions = first + np.arange(depth + 1)
    return ChainUniforms(
        uniforms(seeds, positions, Stream.TARGET).to(device), uniforms(seeds, positions[:, :depth], Stream.ACCEPT).to(device)
    )


def _committed_tokens(draft: DraftTree, outcome: Verification) -> list[list[int]]:
    drafted, accepted, following = draft.tokens.tolist(), outcome.accepted.tolist(), outcome.next_token.tolist()
    return [[*row[:count], token] for row, count, token in zip(drafted, accepted, following, strict=True)]


def _logprobs(
    probs: torch.Tensor, logits: torch.Tensor, sequences: Sequence[SequenceState], tokens: list[list[int]]
) -> list[list[float]]:
    width = max(len(row) for row in tokens)
    index = torch.tensor([row + [0] * (width - len(row)) for row in tokens], device=probs.device)
    chosen = probs[:, :width].gather(-1, index[..., None])[..., 0].log()
    greedy = [row for row, s in enumerate(sequences) if s.request.params.greedy]
    if greedy and len(greedy) < len(sequences):  # in a mixed batch a greedy row's processed distribution is a point mass
        full = torch.log_softmax(logits[greedy, :width].float(), dim=-1)
        chosen[greedy] = full.gather(-1, index[greedy][..., None])[..., 0]
    return chosen.tolist()
