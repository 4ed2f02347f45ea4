"""Measures the seconds of a target forward by batch size, tokens per sequence and context, at start-up."""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass

import numpy as np
import torch

from paceline.rollout.model.runner import ModelRunner

_WIDTHS = (1, 2, 4, 8, 16)  # tokens per sequence that are timed
_FAR_CONTEXT = 1024  # tokens of context at which the slope over the context is measured


@dataclass(frozen=True, slots=True)
class ForwardTable:
    """Estimates the seconds of a forward from calibration measurements.

    Attributes:
        points: Pairs (tokens of the whole forward, seconds) at the start of texts, both increasing.
        by_batch: Seconds per sequence and token of context. It dominates where memory bandwidth is the limit,
            since keys are read once per sequence.
        by_token: Seconds per token read and token of context. It dominates where arithmetic is the limit,
            since each token is multiplied with all keys.
    """

    points: tuple[tuple[int, float], ...]
    by_batch: float = 0.0
    by_token: float = 0.0

    def seconds(self, batch: int, width: int, context: int) -> float:
        """Returns the estimated seconds of a forward.

        Args:
            batch: Number of sequences.
            width: Number of tokens per sequence.
            context: Number of tokens before them.
        """
        near = _interpolate(self.points, batch * width)
        return near + batch * context * (self.by_batch + width * self.by_token)


def calibrate_forward(runner: ModelRunner, slots: int, max_width: int) -> ForwardTable:
    """Times forwards over the (empty) cache, at its start and far from it.

    Args:
        runner: Runner that holds no sequence. The slots are written to; the next prefill overwrites them.
        slots: Largest batch size.
        max_width: Maximum number of tokens per sequence in a forward.
    """
    widths = [width for width in _WIDTHS if width <= max_width]
    near = {shape: _time_forward(runner, *shape, 0) for shape in _shapes(runner, slots, widths, 0)}
    table = ForwardTable(_monotone([(batch * width, seconds) for (batch, width), seconds in near.items()]))
    far = min(_FAR_CONTEXT, runner.cache.shape.capacity - max_width - 1)
    if far < _FAR_CONTEXT // 8:
        return table
    rows, excess_seconds = [], []
    for batch, width in _shapes(runner, slots, widths[::2], far):
        rows.append([batch * far, batch * far * width])
        excess_seconds.append(_time_forward(runner, batch, width, far) - table.seconds(batch, width, 0))
    # weighting fits relative errors, so that large batches do not dominate small ones
    weights = 1 / np.array([row[1] for row in rows], dtype=float)
    fitted = np.linalg.lstsq(
        np.array(rows) * weights[:, None], np.array(excess_seconds) * weights, rcond=None
    )[0]
    by_batch, by_token = (max(float(x), 0.0) for x in fitted)
    return ForwardTable(table.points, by_batch, by_token)


def _shapes(runner: ModelRunner, slots: int, widths: list[int], context: int) -> list[tuple[int, int]]:
    """Returns the pairs (batch, width) to measure, after making room for them in the cache."""
    end = context + max(widths) + 1
    slots = min(slots, runner.cache.slots_at(end))
    runner.cache.reserve([end] * slots, active=0)
    batches = itertools.takewhile(lambda batch: batch <= slots, (4**i for i in range(8)))
    return list(itertools.product(batches, widths))


def _time_forward(runner: ModelRunner, batch: int, width: int, context: int) -> float:
    """Returns the seconds of the fastest of a few forwards."""
    tokens = torch.zeros(batch, width, dtype=torch.long, device=runner.cache.device)
    best = float("inf")
    for _ in range(3 if context == 0 else 2):
        begin = time.perf_counter()
        runner.decode(tokens, [width] * batch, [context] * batch)
        if runner.cache.device.type == "cuda":
            torch.cuda.synchronize(runner.cache.device)
        best = min(best, time.perf_counter() - begin)
    return best


def _monotone(points: list[tuple[int, float]]) -> tuple[tuple[int, float], ...]:
    """Returns the fastest time of each token count, made non-decreasing."""
    fastest: dict[int, float] = {}
    for tokens, seconds in points:
        fastest[tokens] = min(seconds, fastest.get(tokens, seconds))
    table, floor = [], 0.0
    for tokens in sorted(fastest):
        floor = max(floor, fastest[tokens])
        table.append((tokens, floor))
    return tuple(table)


def _interpolate(points: tuple[tuple[int, float], ...], tokens: int) -> float:
    """Returns the seconds at a token count, interpolated linearly and extrapolated proportionally."""
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if tokens <= x1:
            return y0 + (y1 - y0) * max(tokens - x0, 0) / (x1 - x0)
    last_tokens, last_seconds = points[-1]
    return last_seconds * max(tokens / last_tokens, 1.0)
