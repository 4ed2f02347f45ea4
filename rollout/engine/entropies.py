"""Entropies of the distributions that the policy sampled its tokens from."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from paceline.rollout.native import upload
from paceline.rollout.sampling import processed_probs
from paceline.rollout.sequence import SequenceState
from paceline.rollout.trees import DraftTree


def drawn_entropies(
    sequences: Sequence[SequenceState], logits: torch.Tensor, draft: DraftTree, paths: Sequence[Sequence[int]]
) -> list[list[float]]:
    """Returns the entropy, in nats, of the processed distribution that each verified token was sampled from.

    Args:
        sequences: B sequences.
        logits: Logits [R, V]: for each sequence in turn, those after its last committed token and after each
            of its draft nodes.
        draft: Draft that was verified.
        paths: Accepted draft nodes of each sequence, root first.

    Returns:
        For each sequence, one number for every accepted node and one for the token after them; 0 at
        temperature 0.
    """
    counts = (draft.lengths + 1).tolist()
    rows, params, sizes, start = [], [], [], 0
    for sequence, path, count in zip(sequences, paths, counts, strict=True):
        rows += [start, *(start + 1 + node for node in path)]
        params += [sequence.request.params] * (len(path) + 1)
        sizes.append(len(path) + 1)
        start += count
    probs = processed_probs(logits[upload(rows, logits.device)][:, None], params)[:, 0]
    entropies = torch.special.entr(probs).sum(-1).cpu()
    return [part.tolist() for part in entropies.split(sizes)]
