"""Estimates how many of a drafter's tokens are accepted, level by level."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

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

    The prior of a level is the estimate of the level above it, so that what is learned of shallow drafts is
    expected of deeper ones.

    A sequence that was offered fewer levels than asked counts as a rejection at the first missing level: an
    empty proposal costs the same forward as a wrong one. Beside the counts, which remember about 100 drafts,
    a second set remembers about 10; if the two differ by more than chance allows, the long memory is dropped.

    Args:
        prior: Returns the prior of the first level.
    """

    def __init__(self, prior: Callable[[], float]) -> None:
        self._prior = prior
        self._kept: list[float] = []
        self._tried: list[float] = []
        self._trust: list[float] = []  # drafts that the prior counts for
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
            self._kept[i] = fade * self._kept[i] + kept
            self._tried[i] = fade * self._tried[i] + reached
            self._trust[i] *= fade
        changed = any(map(self._differs, range(depth), self.rates(depth)))
        if changed:
            for i, (kept_lately, tried_lately) in enumerate(self._recent):
                if tried_lately >= 1:  # at the prior's weight, so that the next steps soon outweigh these
                    self._kept[i] = _PRIOR_WEIGHT * kept_lately / tried_lately
                    self._tried[i], self._trust[i] = _PRIOR_WEIGHT, 0.0
        return changed

    def _differs(self, level: int, rate: float) -> bool:
        kept, tried = self._recent[level]
        if tried < _MIN_RECENT_DRAFTS:
            return False
        usual = min(max(rate, 0.05), 0.95)
        return abs(kept / tried - usual) > _SURPRISE * (usual * (1 - usual) / tried) ** 0.5

    def _extend_to(self, depth: int) -> None:
        missing = max(depth - len(self._kept), 0)
        self._kept += [0.0] * missing
        self._tried += [0.0] * missing
        self._trust += [_PRIOR_WEIGHT] * missing
        self._recent += [(0.0, 0.0)] * missing

    def soften(self) -> None:
        """Reduces the weight of past counts to that of the prior, because they may be out of date."""
        for i in range(len(self._kept)):
            factor = min(_PRIOR_WEIGHT / self.weight(i), 1.0)
            self._kept[i] *= factor
            self._tried[i] *= factor
            self._trust[i] *= factor

    def weight(self, level: int) -> float:
        """Returns the number of drafts that the estimate of a level counts for, its prior included."""
        self._extend_to(level + 1)
        return self._tried[level] + self._trust[level]

    def first_level(self, prior: float) -> float:
        """Returns the estimate of the first level if its prior were ``prior`` at full weight."""
        self._extend_to(1)
        return (_PRIOR_WEIGHT * prior + self._kept[0]) / (_PRIOR_WEIGHT + self._tried[0])

    def counts(self) -> tuple[list[float], list[float]]:
        """Returns the numbers of accepted and of tried drafts of each level, in which the priors count."""
        depth = len(self._kept)
        tried = [self.weight(i) for i in range(depth)]
        return [rate * n for rate, n in zip(self.rates(depth), tried, strict=True)], tried

    def restore(self, kept: Sequence[float], tried: Sequence[float]) -> None:
        """Sets the numbers to saved ones, see `counts`."""
        self._kept, self._tried = [float(k) for k in kept], [float(t) for t in tried]
        self._trust, self._recent = [0.0] * len(self._kept), [(0.0, 0.0)] * len(self._kept)

    def rates(self, depth: int, doubt: float = 0.0, idle: int = 0) -> list[float]:
        """Returns P(level i is accepted | those above were) for each level.

        Args:
            depth: Number of levels.
            doubt: Number of standard errors to add, for an optimistic estimate.
            idle: Steps since the last observation: knowledge about a changing policy ages.
        """
        self._extend_to(depth)
        rates, rate = [], self._prior()
        for kept, tried, trust in zip(self._kept[:depth], self._tried, self._trust, strict=False):
            rate = (trust * rate + kept) / (trust + tried)
            rates.append(rate)
        if not doubt:
            return rates
        age = _AGING ** min(idle, _OLDEST)
        weights = (self.weight(i) * age for i in range(depth))
        spreads = ((r * (1 - r) + _EXTRA_VARIANCE) / n for r, n in zip(rates, weights, strict=True))
        return [min(r + doubt * spread**0.5, 0.95) for r, spread in zip(rates, spreads, strict=True)]


def expected_tokens(rates: Sequence[float]) -> float:
    """Returns the expected tokens that one step commits for each sequence, 1 + Σ_i Π_{j≤i} P(level j).

    Leviathan et al., arXiv 2211.17192, eq. 1, with a separate probability for each level.
    """
    total, running = 1.0, 1.0
    for rate in rates:
        running *= rate
        total += running
    return total
