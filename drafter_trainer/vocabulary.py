"""The trimmed draft vocabulary: the tokens that the policy says."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import torch


def choose_vocabulary(texts: Iterable[Sequence[int]], size: int, vocab_size: int) -> torch.Tensor:
    """The ``size`` most frequent token ids of ``texts``, filled up with the lowest unused ids.

    VocabTrim (arXiv 2506.22694), section 3: a drafter's head over the tokens the target samples most costs little; a token
    outside it can never be drafted, but is still produced by the target.

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
