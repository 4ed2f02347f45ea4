"""One verification of a batch: logits to the tokens that each sequence commits, and their log-probs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from rollout.randomness import Stream, uniforms
from rollout.sampling import draw_tokens, processed_probs
from rollout.sequence import SequenceState
from rollout.trees.chain import DraftTree
from rollout.verify import ChainUniforms, verify_chain, verify_deterministic


@dataclass(frozen=True, slots=True)
class BatchOutcome:
    """What one target forward decided, one entry a sequence.

    Attributes:
        accepted: Draft tokens kept.
        tokens: Kept draft tokens and the token after them.
        logprobs: Of those tokens.
        finite: Whether the logits were all usable; where not, the other entries mean nothing.
    """

    accepted: list[int]
    tokens: list[list[int]]
    logprobs: list[list[float]]
    finite: list[bool]


def verify_batch(sequences: Sequence[SequenceState], logits: torch.Tensor, draft: DraftTree) -> BatchOutcome:
    """Accepts or rejects each sequence's draft.

    Args:
        sequences: B sequences.
        logits: [R, V]; for each sequence in turn, after its last committed token and after each of its draft tokens.
        draft: A chain of N nodes.
    """
    lengths = draft.lengths.numpy()
    first = np.array([len(s.tokens) for s in sequences])
    if draft.probs is None or draft.tokens.shape[1] == 0:
        return _deterministic(sequences, logits, draft, lengths, first)
    return _sampled(sequences, logits, draft, lengths, first)


def _deterministic(
    sequences: Sequence[SequenceState], logits: torch.Tensor, draft: DraftTree, lengths: np.ndarray, first: np.ndarray
) -> BatchOutcome:
    counts = lengths + 1
    ends = counts.cumsum()
    params = [p for s, count in zip(sequences, counts, strict=True) for p in [s.request.params] * int(count)]
    seeds = np.repeat([s.request.seed for s in sequences], counts)
    positions = np.arange(ends[-1]) + np.repeat(first - (ends - counts), counts)
    tokens, logprobs = draw_tokens(logits, params, uniforms(seeds, positions[:, None], Stream.TARGET)[:, 0])
    drawn, drawn_logprobs, drafted = _to_host(tokens, logprobs, draft.tokens)
    starts = torch.from_numpy(ends - counts)[:, None]
    rows = (starts + torch.arange(draft.tokens.shape[1] + 1)).clamp_(max=len(drawn) - 1)
    host_draft = DraftTree(drafted.long(), draft.parents, draft.lengths)
    accepted = verify_deterministic(drawn.long()[rows], host_draft).accepted.tolist()
    finite = torch.isfinite(drawn_logprobs)
    kept = [slice(int(start), int(start) + a + 1) for start, a in zip(starts[:, 0], accepted, strict=True)]
    return BatchOutcome(
        accepted,
        [drawn[s].long().tolist() for s in kept],
        [drawn_logprobs[s].tolist() for s in kept],
        [bool(finite[int(end) - int(count) : int(end)].all()) for end, count in zip(ends, counts, strict=True)],
    )


def _to_host(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Float64 copies on the CPU, fetched from a GPU in one transfer; exact for token ids and float32."""
    if all(t.device.type == "cpu" for t in tensors):
        return list(tensors)
    device = next(t.device for t in tensors if t.device.type != "cpu")
    joined = torch.cat([t.to(device, torch.float64).flatten() for t in tensors]).cpu()
    return [part.view(t.shape) for part, t in zip(joined.split([t.numel() for t in tensors]), tensors, strict=True)]


def _sampled(
    sequences: Sequence[SequenceState], logits: torch.Tensor, draft: DraftTree, lengths: np.ndarray, first: np.ndarray
) -> BatchOutcome:
    device, depth = logits.device, draft.tokens.shape[1]
    params = [s.request.params for s in sequences]
    starts = np.concatenate([[0], (lengths + 1).cumsum()[:-1]])
    nodes = np.minimum(np.arange(depth + 1), lengths[:, None])  # past a sequence's end its last row stands in
    padded = logits[torch.from_numpy(starts[:, None] + nodes).to(device)]
    probs = processed_probs(padded, params)
    seeds = np.array([s.request.seed for s in sequences])
    positions = first[:, None] + np.arange(depth + 1)
    numbers = ChainUniforms(
        uniforms(seeds, positions, Stream.TARGET).to(device), uniforms(seeds, positions[:, :depth], Stream.ACCEPT).to(device)
    )
    outcome = verify_chain(probs, draft.to(device), numbers)
    index = torch.arange(depth + 1, device=device)
    chosen = torch.cat([draft.tokens.to(device), outcome.next_token[:, None]], dim=1)
    chosen = torch.where(index == outcome.accepted[:, None], outcome.next_token[:, None], chosen)
    logprobs = _logprobs(probs, padded, params, chosen)
    finite = torch.isfinite(padded.amax(-1)).all(-1)
    accepted, tokens, values, usable = _to_host(outcome.accepted, chosen, logprobs, finite)
    kept = [int(a) for a in accepted.tolist()]
    return BatchOutcome(
        kept,
        [[int(t) for t in row[: a + 1]] for row, a in zip(tokens.tolist(), kept, strict=True)],
        [row[: a + 1] for row, a in zip(values.tolist(), kept, strict=True)],
        [bool(f) for f in usable.tolist()],
    )


def _logprobs(probs: torch.Tensor, logits: torch.Tensor, params: Sequence, tokens: torch.Tensor) -> torch.Tensor:
    """float32 [B, N + 1] log-probs of ``tokens``; at temperature 0 those of the unscaled distribution."""
    chosen = probs.gather(-1, tokens[..., None])[..., 0].log()
    greedy = [row for row, p in enumerate(params) if p.greedy]
    if greedy:
        full = torch.log_softmax(logits[greedy].float(), dim=-1)
        chosen[greedy] = full.gather(-1, tokens[greedy][..., None])[..., 0]
    return chosen
