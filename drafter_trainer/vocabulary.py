"""The trimmed draft vocabulary: the tokens that the policy samples most."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from torch import nn

from paceline.rollout.drafters.eagle3_model import Eagle3Model


def choose_vocabulary(texts: Iterable[Sequence[int]], size: int, vocab_size: int) -> torch.Tensor:
    """Returns the ``size`` most frequent token ids of ``texts``, filled up with the lowest unused ids.

    VocabTrim (arXiv 2506.22694), section 3: an output head over only the tokens that the target samples most
    is cheap. A token outside it can never be drafted, but the target can still produce it.

    Args:
        texts: Token ids of the policy's prompts and completions.
        size: Number of tokens of the draft vocabulary, at most ``vocab_size``.
        vocab_size: Number of tokens of the target's vocabulary.

    Returns:
        int64 [size], increasing.
    """
    counts = Counter(token for text in texts for token in text)
    chosen = [token for token, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:size]]
    used = set(chosen)
    filler = (token for token in range(vocab_size) if token not in used)
    chosen += [token for token, _ in zip(filler, range(size - len(chosen)), strict=False)]
    return torch.tensor(sorted(chosen))


def coverage(texts: Iterable[Sequence[int]], vocabulary: torch.Tensor) -> float:
    """Returns the share of the tokens of ``texts`` that are in ``vocabulary``."""
    known = set(vocabulary.tolist())
    counts = Counter(token for text in texts for token in text)
    return sum(n for token, n in counts.items() if token in known) / max(sum(counts.values()), 1)


@torch.no_grad()
def move_vocabulary(
    model: Eagle3Model, optimizer: torch.optim.Optimizer, vocabulary: torch.Tensor, head: nn.Module
) -> None:
    """Replaces the drafter's vocabulary by another one of the same size.

    Tokens that stay keep their row of the output layer and its optimizer moments. A new token's row is copied
    from the target, with moments of zero.

    Args:
        model: The drafter.
        optimizer: Optimizer of its parameters.
        vocabulary: int64 [draft vocabulary], increasing.
        head: The target's output head.
    """
    old, weight = model.vocabulary, model.lm_head.weight
    row_of_token = torch.full((len(model.t2d),), -1, dtype=torch.long, device=old.device)
    row_of_token[old] = torch.arange(len(old), device=old.device)
    source_row = row_of_token[vocabulary.to(old.device)]
    new = source_row < 0
    target_rows: torch.Tensor = next(head.parameters())
    for tensor in (weight, *(v for v in optimizer.state.get(weight, {}).values() if v.shape == weight.shape)):
        moved = tensor[source_row.clamp(min=0)]
        moved[new] = target_rows[vocabulary.to(old.device)[new]].to(moved) if tensor is weight else 0.0
        tensor.copy_(moved)
    model.set_vocabulary(vocabulary.to(old.device))
