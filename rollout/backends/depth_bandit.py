"""How many draft tokens pay at a batch size, learned while vLLM decodes."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

_BURST = 4  # steps of a trial; the first verifies what the choice before it drafted


@dataclass(slots=True)
class _Arm:
    steps: deque[tuple[float, float]]

    @property
    def rate(self) -> float:
        return sum(tokens for tokens, _ in self.steps) / max(sum(seconds for _, seconds in self.steps), 1e-9)


@dataclass(slots=True)
class _Bucket:
    arms: dict[int, _Arm] = field(default_factory=dict)
    chosen: int = 0
    left: int = 0


class DepthBandit:
    """An ε-greedy bandit for each batch bucket (powers of two) over draft depths, 0 for none, by tokens of a
    sequence and second.

    As `paceline.rollout.strategy.bandit`, but without a cost model: vLLM's steps cannot be timed apart before
    they run. Every depth is first tried for a few steps; later trials are an ε of the bursts. What is chosen
    depends on counts and times of earlier steps alone, so tokens keep the policy's distribution.

    Args:
        depths: To choose from.
        epsilon: Share of bursts that try another than the best.
        window: Steps of a depth that count.
        seed: Of the trials.
    """

    def __init__(
        self, depths: Sequence[int], *, epsilon: float = 0.05, window: int = 64, seed: int = 0
    ) -> None:
        self.depths = tuple(dict.fromkeys(depths))
        self._epsilon, self._window, self._random = epsilon, window, random.Random(seed)
        self._buckets: dict[int, _Bucket] = {}

    def choose(self, active: int) -> int:
        """The depth for the next step of ``active`` sequences."""
        bucket = self._bucket(active)
        if bucket.left == 0:
            bucket.chosen, bucket.left = self._next(bucket), _BURST
        bucket.left -= 1
        return bucket.chosen

    def _next(self, bucket: _Bucket) -> int:
        untried = [d for d in self.depths if d not in bucket.arms or not bucket.arms[d].steps]
        if untried:
            return untried[0]
        if self._random.random() < self._epsilon:
            return self._random.choice(self.depths)
        return max(self.depths, key=lambda d: bucket.arms[d].rate)

    def record(self, active: int, depth: int, tokens: int, seconds: float) -> None:
        """A step is over that verified drafts of ``depth``.

        Args:
            active: Sequences in it.
            depth: Of the drafts that it verified.
            tokens: Committed by all of them.
            seconds: That it took.
        """
        arm = self._bucket(active).arms.setdefault(depth, _Arm(deque(maxlen=self._window)))
        arm.steps.append((tokens / active, seconds))

    def drafter_changed(self) -> None:
        """What was measured with the old weights counts for little: the last steps of each depth are kept."""
        for bucket in self._buckets.values():
            for arm in bucket.arms.values():
                while len(arm.steps) > _BURST:
                    arm.steps.popleft()

    def schedule(self) -> list[tuple[int, int, int]]:
        """The best depth of each bucket seen, as vLLM's ``num_speculative_tokens_per_batch_size``: (from, to,
        tokens). Sizes between two buckets go with the larger one.
        """
        found = sorted(
            (size, b) for size, b in self._buckets.items() if any(a.steps for a in b.arms.values())
        )
        best = [(size, max(b.arms, key=lambda d: b.arms[d].rate)) for size, b in found]
        starts = [1] + [size + 1 for size, _ in best[:-1]]
        return [(start, size, depth) for start, (size, depth) in zip(starts, best, strict=True)]

    def _bucket(self, active: int) -> _Bucket:
        return self._buckets.setdefault(1 << (active - 1).bit_length(), _Bucket())
