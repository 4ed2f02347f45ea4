"""A bandit that learns, while vLLM decodes, how many draft tokens pay at a batch size."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

_BURST_STEPS = 4  # steps with one choice; the first of them verifies drafts of the choice before it


@dataclass(slots=True)
class _Arm:
    """The recent steps of one depth: (tokens per sequence, seconds) of each."""

    steps: deque[tuple[float, float]]

    @property
    def rate(self) -> float:
        """The number of tokens per sequence and second over the recent steps."""
        return sum(tokens for tokens, _ in self.steps) / max(sum(seconds for _, seconds in self.steps), 1e-9)


@dataclass(slots=True)
class _Bucket:
    """The arms of one bucket of batch sizes, and the burst of steps that is under way."""

    arms: dict[int, _Arm] = field(default_factory=dict)
    chosen: int = 0
    left: int = 0


class DepthBandit:
    """An ε-greedy bandit over draft depths, 0 for none, for each bucket of batch sizes (powers of two).

    The reward is tokens per sequence and second, as in `paceline.rollout.strategy.bandit`, but there is no
    cost model: the parts of vLLM's steps cannot be timed separately. Every depth is first tried for a few
    steps; later, a share ε of the bursts tries a random depth. The choice depends on counts and times of
    earlier steps alone, so that tokens keep the policy's distribution.

    Args:
        depths: Depths to choose from.
        epsilon: Share of bursts that try a random depth.
        window: Number of steps of a depth that count.
        seed: Seed of the trials.
    """

    def __init__(
        self, depths: Sequence[int], *, epsilon: float = 0.05, window: int = 64, seed: int = 0
    ) -> None:
        self.depths = tuple(dict.fromkeys(depths))
        self._epsilon, self._window, self._random = epsilon, window, random.Random(seed)
        self._buckets: dict[int, _Bucket] = {}

    def choose(self, active: int) -> int:
        """Returns the depth for the next step of ``active`` sequences."""
        bucket = self._bucket(active)
        if bucket.left == 0:
            bucket.chosen, bucket.left = self._next(bucket), _BURST_STEPS
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
        """Learns from a step that verified drafts of ``depth``.

        Args:
            active: Number of sequences in the step.
            depth: Depth of the drafts that it verified.
            tokens: Number of tokens that all of them committed.
            seconds: Duration of the step.
        """
        arm = self._bucket(active).arms.setdefault(depth, _Arm(deque(maxlen=self._window)))
        arm.steps.append((tokens / active, seconds))

    def drafter_changed(self) -> None:
        """Keeps only the last steps of each depth, because older ones were measured with other weights."""
        for bucket in self._buckets.values():
            for arm in bucket.arms.values():
                while len(arm.steps) > _BURST_STEPS:
                    arm.steps.popleft()

    def schedule(self) -> list[tuple[int, int, int]]:
        """Returns the best depth of each bucket seen, in the format of vLLM's speculation schedule.

        Returns:
            (from, to, tokens) entries of ``num_speculative_tokens_per_batch_size``. Sizes between two buckets
            belong to the larger one.
        """
        measured = sorted(
            (size, b) for size, b in self._buckets.items() if any(a.steps for a in b.arms.values())
        )
        best = [(size, max(b.arms, key=lambda d: b.arms[d].rate)) for size, b in measured]
        starts = [1] + [size + 1 for size, _ in best[:-1]]
        return [(start, size, depth) for start, (size, depth) in zip(starts, best, strict=True)]

    def _bucket(self, active: int) -> _Bucket:
        return self._buckets.setdefault(1 << (active - 1).bit_length(), _Bucket())
