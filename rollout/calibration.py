"""Seconds of a target forward by batch and tokens a sequence, measured once at start."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable

import torch

from rollout.model_runner import ModelRunner

_WIDTHS = (1, 2, 4, 8, 16)


def calibrate_forward(runner: ModelRunner, slots: int, max_width: int) -> Callable[[int, int], float]:
    """Times forwards over the (empty) cache.

    Args:
        runner: Holds no sequence; what is written to its slots is overwritten by the next prefill.
        slots: Largest batch.
        max_width: Most tokens of one sequence in a forward.

    Returns:
        (batch, tokens of each sequence) → seconds, linear in the number of tokens between the measured points.
    """
    points: list[tuple[int, float]] = []
    batch = 1
    slots = min(slots, runner.cache.slots_at(runner.cache.span))
    runner.cache.reserve(runner.cache.span, active=0, slots=slots)
    while batch <= slots:
        points += [(batch * width, _time_forward(runner, batch, width)) for width in _WIDTHS if width <= max_width]
        batch *= 4
    table = _monotone(points)
    return lambda b, width: _interpolate(table, b * width)


def _time_forward(runner: ModelRunner, batch: int, width: int) -> float:
    tokens = torch.zeros(batch, width, dtype=torch.long, device=runner.cache.device)
    best = float("inf")
    for _ in range(3):
        begin = time.perf_counter()
        runner.decode(tokens, [width] * batch, [0] * batch)
        if runner.cache.device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - begin)
    return best


def _monotone(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """The fastest time of each token count, made non-decreasing."""
    fastest: dict[int, float] = {}
    for tokens, seconds in points:
        fastest[tokens] = min(seconds, fastest.get(tokens, seconds))
    table, floor = [], 0.0
    for tokens in sorted(fastest):
        floor = max(floor, fastest[tokens])
        table.append((tokens, floor))
    return table


def _interpolate(table: list[tuple[int, float]], tokens: int) -> float:
    for (x0, y0), (x1, y1) in itertools.pairwise(table):
        if tokens <= x1:
            return y0 + (y1 - y0) * max(tokens - x0, 0) / (x1 - x0)
    last_tokens, last_seconds = table[-1]
    return last_seconds * max(tokens / last_tokens, 1.0)
