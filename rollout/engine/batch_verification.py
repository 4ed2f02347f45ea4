"""Verification of one batch: turns logits into the tokens that each sequence commits and their log-probs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from paceline.rollout.api import SamplingParams
from paceline.rollout.counter_rng import Stream, step_uniforms, uniforms
from paceline.rollout.native import AnyKernels, download, load_kernels, upload
from paceline.rollout.sampling import draw_tokens, kernel_temperatures, processed_probs
from paceline.rollout.sequence import SequenceState, seeds_of
from paceline.rollout.trees import DraftKind, DraftTree, chain_parents, tree_shape
from paceline.rollout.verify import Uniforms, Verifier, default_verifier, verify_deterministic


@dataclass(frozen=True, slots=True)
class BatchOutcome:
    """Holds what one target forward decided, with one entry per sequence.

    Attributes:
        paths: Accepted draft nodes, root first.
        tokens: Accepted draft tokens and the token sampled after them.
        logprobs: Log-probs of those tokens.
        finite: Whether all the logits used were finite. If not, the sequence's other entries are meaningless.
        drafted: The draft's tokens on the CPU, int64 [B, N].
    """

    paths: list[list[int]]
    tokens: list[list[int]]
    logprobs: list[list[float]]
    finite: list[bool]
    drafted: torch.Tensor


def verify_batch(
    sequences: Sequence[SequenceState],
    logits: torch.Tensor,
    draft: DraftTree,
    verifier: Verifier | None = None,
) -> BatchOutcome:
    """Accepts or rejects each sequence's draft.

    Args:
        sequences: B sequences.
        logits: Logits [R, V]: for each sequence in turn, those after its last committed token and after each
            of its draft nodes.
        draft: Chains or trees of up to N nodes.
        verifier: Verifier of sampled drafts; None selects token-by-token verification for chains and
            recursive verification for trees. Deterministic drafts need none: no verifier accepts more of them
            than following the target's own samples.

    Raises:
        ValueError: The verifier does not cover such drafts.
    """
    counts = draft.lengths.numpy() + 1
    first = np.array([len(s.tokens) for s in sequences])
    if draft.kind is DraftKind.FIXED or draft.nodes == 0:
        kernels = load_kernels(logits.device.type, logits.dtype)
        if kernels is not None and not any(s.request.params.truncated for s in sequences):
            return _verify_natively(kernels, sequences, logits, draft, counts, first)
        return _verify_fixed(sequences, logits, draft, counts, first)
    return _verify_sampled(
        sequences, logits, draft, counts, first, verifier or default_verifier(draft.parents is None)
    )


def _verify_natively(
    kernels: AnyKernels,
    sequences: Sequence[SequenceState],
    logits: torch.Tensor,
    draft: DraftTree,
    counts: np.ndarray,
    first: np.ndarray,
) -> BatchOutcome:
    """Does the work of `_verify_fixed` with native kernels, which sample along the accepted path only."""
    rows, nodes = torch.from_numpy(counts.cumsum() - counts), draft.lengths
    parents = chain_parents(*draft.tokens.shape) if draft.parents is None else draft.parents
    seeds = seeds_of(sequences)
    numbers = uniforms(seeds, first[:, None] + np.arange(draft.nodes + 1), Stream.TARGET)
    temperatures = kernel_temperatures([s.request.params for s in sequences])
    found = kernels.follow(logits, rows, nodes, (draft.tokens, parents), (temperatures, numbers))
    lengths, values = found.lengths.tolist(), found.logprobs.tolist()
    return BatchOutcome(
        [row[:n] for row, n in zip(found.path.tolist(), lengths, strict=True)],
        [row[: n + 1] for row, n in zip(found.tokens.tolist(), lengths, strict=True)],
        [row[: n + 1] for row, n in zip(values, lengths, strict=True)],
        [all(map(math.isfinite, row[: n + 1])) for row, n in zip(values, lengths, strict=True)],
        torch.from_numpy(found.drafted),
    )


def _verify_fixed(
    sequences: Sequence[SequenceState],
    logits: torch.Tensor,
    draft: DraftTree,
    counts: np.ndarray,
    first: np.ndarray,
) -> BatchOutcome:
    """Samples a token after every node, then accepts the nodes that agree with these samples."""
    ends = counts.cumsum()
    starts = ends - counts
    params = [p for s, count in zip(sequences, counts, strict=True) for p in [s.request.params] * int(count)]
    seeds = np.repeat(seeds_of(sequences), counts)
    parents = draft.parents
    positions = np.repeat(first, counts) + _depths(parents, counts, starts)
    tokens, logprobs = draw_tokens(logits, params, uniforms(seeds, positions[:, None], Stream.TARGET)[:, 0])
    drawn, drawn_logprobs, drafted = download(tokens, logprobs, draft.tokens)
    rows = (torch.from_numpy(starts)[:, None] + torch.arange(draft.nodes + 1)).clamp_(max=len(drawn) - 1)
    outcome = verify_deterministic(drawn.long()[rows], DraftTree(drafted.long(), draft.lengths, parents))
    finite = torch.isfinite(drawn_logprobs)
    paths = [path[:a] for path, a in zip(outcome.path.tolist(), outcome.accepted.tolist(), strict=True)]
    # rows of the tokens sampled after the last committed token and after each accepted node
    sampled_rows = [
        [int(start), *(int(start) + 1 + node for node in path)]
        for start, path in zip(starts, paths, strict=True)
    ]
    flat = torch.tensor([row for rows in sampled_rows for row in rows])
    sizes = [len(rows) for rows in sampled_rows]
    return BatchOutcome(
        paths,
        [part.tolist() for part in drawn.long()[flat].split(sizes)],
        [part.tolist() for part in drawn_logprobs[flat].split(sizes)],
        [bool(part.all()) for part in finite.split(counts.tolist())],
        drafted.long(),
    )


def _depths(parents: torch.Tensor | None, counts: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Returns the depth of each row's token below the last committed one, int64 [R]."""
    if parents is None:
        return np.arange(counts.sum()) - np.repeat(starts, counts)
    depth = torch.nn.functional.pad(tree_shape(parents)[0], (1, 0)).numpy()
    return depth[np.arange(depth.shape[1]) < counts[:, None]]


def _verify_sampled(
    sequences: Sequence[SequenceState],
    logits: torch.Tensor,
    draft: DraftTree,
    counts: np.ndarray,
    first: np.ndarray,
    verifier: Verifier,
) -> BatchOutcome:
    """Verifies sampled drafts with a verifier that reads the processed distributions."""
    device, nodes = logits.device, draft.nodes
    params = [s.request.params for s in sequences]
    # past the end of a sequence's draft, its last row serves as padding
    at = np.minimum(np.arange(nodes + 1), counts[:, None] - 1)
    padded = logits[upload((counts.cumsum() - counts)[:, None] + at, device)]
    probs = processed_probs(padded, params)
    seeds = seeds_of(sequences)
    numbers = Uniforms(
        upload(uniforms(seeds, first[:, None] + np.arange(nodes + 1), Stream.TARGET), device),
        upload(step_uniforms(seeds, first, 0, nodes, Stream.ACCEPT), device),
    )
    outcome = verifier(probs, draft, numbers)
    index = torch.arange(nodes + 1, device=device)
    path = torch.nn.functional.pad(outcome.path.clamp(min=0), (0, 1))
    chosen = draft.tokens.gather(1, path.clamp(max=nodes - 1))
    chosen = torch.where(index == outcome.accepted[:, None], outcome.next_token[:, None], chosen)
    # the row whose distribution each chosen token was sampled from
    sampled_from = torch.nn.functional.pad(path[:, :-1] + 1, (1, 0))
    logprobs = _logprobs(probs, padded, params, sampled_from, chosen)
    finite = torch.isfinite(padded.amax(-1)).all(-1)
    accepted, kept, tokens, values, usable, drafted = download(
        outcome.accepted, path, chosen, logprobs, finite, draft.tokens
    )
    sizes = [int(a) for a in accepted.tolist()]
    return BatchOutcome(
        [[int(n) for n in row[:a]] for row, a in zip(kept.tolist(), sizes, strict=True)],
        [[int(t) for t in row[: a + 1]] for row, a in zip(tokens.tolist(), sizes, strict=True)],
        [row[: a + 1] for row, a in zip(values.tolist(), sizes, strict=True)],
        [bool(f) for f in usable.tolist()],
        drafted.long(),
    )


def _logprobs(
    probs: torch.Tensor,
    logits: torch.Tensor,
    params: Sequence[SamplingParams],
    rows: torch.Tensor,
    tokens: torch.Tensor,
) -> torch.Tensor:
    """Returns log-probs float32 [B, N + 1]; at temperature 0 those of the unscaled distribution.

    Args:
        probs: Processed distributions, [B, N + 1, V].
        logits: Logits, [B, N + 1, V].
        params: Sampling parameters of each sequence.
        rows: Row of ``probs`` that each token was sampled from, int64 [B, N + 1].
        tokens: Token ids, int64 [B, N + 1].
    """
    batch = torch.arange(len(rows), device=rows.device)[:, None]
    chosen = probs[batch, rows, tokens].log()
    if any(p.greedy for p in params):
        greedy = upload([p.greedy for p in params], rows.device)
        full = torch.log_softmax(logits.float(), dim=-1)[batch, rows, tokens]
        chosen = torch.where(greedy[:, None], full, chosen)
    return chosen
