"""The trimmed draft vocabulary: the tokens that the policy says."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from torch import nn

from paceline.rollout.drafters.eagle3_model import Eagle3Model


def choose_vocabulary(texts: Iterable[Sequence[int]], size: int, vocab_size: int) -> torch.Tensor:
    """The ``size`` most frequent token ids of ``texts``, filled up with the lowest unused ids.

    VocabTrim (arXiv 2506.22694), section 3: a drafter's head over the tokens the target samples most costs
    little; a token outside it can never be drafted, but is still produced by the target.

    Args:
        texts: Token ids of what the policy produced (and of its prompts).
        size: At most ``vocab_size``.
        vocab_size: Of the target.

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
    """Share of the tokens of ``texts`` that ``vocabulary`` holds."""
    known = set(vocabulary.tolist())
    counts = Counter(token for text in texts for token in text)
    return sum(n for token, n in counts.items() if token in known) / max(sum(counts.values()), 1)


@torch.no_grad()
def move_vocabulary(
    model: Eagle3Model, optimizer: torch.optim.Optimizer, vocabulary: torch.Tensor, head: nn.Module
) -> None:
    """Gives the drafter another vocabulary of the same size.

    Rows of the output layer, and the optimizer's moments, go with their tokens; a new token's row is the
    target's.

    Args:
        model: The drafter.
        optimizer: Over its parameters.
        vocabulary: int64 [draft vocabulary], increasing.
        head: The target's output head.
    """
    old, weight = model.vocabulary, model.lm_head.weight
    place = torch.full((len(model.t2d),), -1, dtype=torch.long, device=old.device)
    place[old] = torch.arange(len(old), device=old.device)
    source = place[vocabulary.to(old.device)]
    new = source < 0
    target_rows: torch.Tensor = next(head.parameters())
    for tensor in (weight, *(v for v in optimizer.state.get(weight, {}).values() if v.shape == weight.shape)):
        moved = tensor[source.clamp(min=0)]
        moved[new] = target_rows[vocabulary.to(old.device)[new]].to(moved) if tensor is weight else 0.0
        tensor.copy_(moved)
    model.set_vocabulary(vocabulary.to(old.device))
