"""Estimates how many of a drafter's tokens are accepted, level by level."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

_DECAY = 0.99  # factor on acceptance counts for each sequence and step: about 100 drafts are remembered
_MAX_DECAYS_PER_STEP = 8  # a large batch must not erase the past in one step
_PRIOR_WEIGHT = 4.0  # drafts that the prior counts for
_RECENT_DECAY = 0.9  # factor on the recent acceptance counts: about 10 drafts are remembered
_MIN_RECENT_DRAFTS = 6.0  # fewer recent drafts are no evidence of a change
_SURPRISE = 3.0  # standard errors between recent and long-term acceptance that are taken for a change
_AGING = 0.99  # factor on the weight of acceptance counts for each step without the drafter
_OLDEST = 1000  # steps after which acceptance counts age no further; their weight would underflow at last
_EXTRA_VARIANCE = 0.25  # added to a rate's variance, since a rate that never varied may still do so


class Acceptance:
    """Estimates P(level i of a draft is accepted | the levels above were), with a prior that fades.

    A sequence that was offered fewer levels than asked counts as a rejection at the first missing level: an
    empty proposal costs the same forward as a wrong one. Beside the counts, which remember about 100 drafts,
    a second set remembers about 10; if the two differ by more than chance allows, the long memory is dropped.
    """

    def __init__(self, prior: float) -> None:
        self._prior = prior
        self.kept: list[float] = []
        self.tried: list[float] = []
        self._recent: list[tuple[float, float]] = []

    def add(self, accepted: Sequence[int], depth: int) -> bool:
        """Adds one step's accepted levels of each sequence.

        Returns:
            Whether they contradict what was known, so that the long memory was dropped.
        """
        self._extend_to(depth)
        changed = False
        ended, kept = Counter(accepted), len(accepted)
        for i in range(depth):
            reached, kept = kept, kept - ended[i]
            if not reached:
                break
            fade = _DECAY ** min(reached, _MAX_DECAYS_PER_STEP)
            recent = _RECENT_DECAY ** min(reached, _MAX_DECAYS_PER_STEP)
            self._recent[i] = recent * self._recent[i][0] + kept, recent * self._recent[i][1] + reached
            self.kept[i] = fade * self.kept[i] + kept
            self.tried[i] = fade * self.tried[i] + reached
            changed |= self._differs(i)
        if changed:
            for i, (kept_lately, tried_lately) in enumerate(self._recent):
                if tried_lately >= 1:  # at the prior's weight, so that the next steps soon outweigh these
                    self.kept[i] = _PRIOR_WEIGHT * kept_lately / tried_lately
                    self.tried[i] = _PRIOR_WEIGHT
        return changed

    def _differs(self, level: int) -> bool:
        kept, tried = self._recent[level]
        if tried < _MIN_RECENT_DRAFTS:
            return False
        usual = min(max(self.kept[level] / self.tried[level], 0.05), 0.95)
        return abs(kept / tried - usual) > _SURPRISE * (usual * (1 - usual) / tried) ** 0.5

    def _extend_to(self, depth: int) -> None:
        while len(self.kept) < depth:
            # a level without observations starts from the rate of the level above
            last = self.kept[-1] / self.tried[-1] if self.kept else self._prior
            self.kept.append(_PRIOR_WEIGHT * last)
            self.tried.append(_PRIOR_WEIGHT)
            self._recent.append((0.0, 0.0))

    def soften(self) -> None:
        """Reduces the weight of past counts to that of the prior, because they may be out of date."""
        for i, tried in enumerate(self.tried):
            self.kept[i] *= min(_PRIOR_WEIGHT / tried, 1.0)
            self.tried[i] = min(tried, _PRIOR_WEIGHT)

    def restore(self, kept: Sequence[float], tried: Sequence[float]) -> None:
        """Sets the counts to saved ones."""
        self.kept, self.tried = [float(k) for k in kept], [float(t) for t in tried]
        self._recent = [(0.0, 0.0)] * len(self.kept)

    def rates(self, depth: int, doubt: float = 0.0, idle: int = 0) -> list[float]:
        """Returns P(level i is accepted | those above were) for each level.

        Args:
            depth: Number of levels.
            doubt: Number of standard errors to add, for an optimistic estimate.
            idle: Steps since the last observation: knowledge about a changing policy ages.
        """
        self._extend_to(depth)
        rates = []
        for kept, tried in zip(self.kept[:depth], self.tried, strict=False):
            rate = kept / tried
            spread = (rate * (1 - rate) + _EXTRA_VARIANCE) / (tried * _AGING ** min(idle, _OLDEST))
            rates.append(min(rate + doubt * spread**0.5, 0.95) if doubt else rate)
        return rates


def expected_tokens(rates: Sequence[float]) -> float:
    """Returns the expected tokens that one step commits for each sequence, 1 + Σ_i Π_{j≤i} P(level j).

    Leviathan et al., arXiv 2211.17192, eq. 1, with a separate probability for each level.
    """
    total, running = 1.0, 1.0
    for rate in rates:
        running *= rate
        total += running
    return total
