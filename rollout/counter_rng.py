"""Random numbers as a pure function of (seed, position, stream).

A stateful generator would make a request's numbers depend on how many draft tokens were verified before. A
counter-based one does not: position 17 of a request sees the same uniform whether plain decoding or
speculation reached it.

The mixing function is the finalizer of SplitMix64 (Steele, Lea, Flood: "Fast Splittable Pseudorandom Number
Generators", OOPSLA 2014, section 3), applied once for each input.
"""

from __future__ import annotations

import enum

import numpy as np
import torch

_GAMMA = np.uint64(0x9E3779B97F4A7C15)  # SplitMix64's increment, the odd integer nearest to 2^64 / φ
_FACTORS = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


class Stream(enum.IntEnum):
    """Names the independent sequences of uniforms of one request."""

    TARGET = 0  # samples a token from the target's (or the residual) distribution
    ACCEPT = 1  # accepts or rejects a draft token
    DRAFT = 2  # samples a token from the drafter's distribution


_NUMBERS_PER_STEP = 1 << 24  # more than one step of a request ever uses, so steps do not overlap


def reduced_seed(seed: int) -> int:
    """Returns a seed modulo 2^64, the range that `uniforms` distinguishes."""
    return seed % 2**64


def _mix(x: np.ndarray) -> np.ndarray:
    x = x + _GAMMA
    x = (x ^ (x >> np.uint64(30))) * _FACTORS[0]
    x = (x ^ (x >> np.uint64(27))) * _FACTORS[1]
    return x ^ (x >> np.uint64(31))


def uniforms(seeds: np.ndarray, positions: np.ndarray, stream: Stream) -> torch.Tensor:
    """Returns uniform numbers in [0, 1).

    Args:
        seeds: Seed of each request, uint64 or int64 [B].
        positions: Absolute position of the token that each number decides, int64 [B, Q].
        stream: Stream to read.

    Returns:
        float64 [B, Q] on the CPU.
    """
    with np.errstate(over="ignore"):
        keys = _mix(_mix(seeds.astype(np.uint64)) + np.uint64(stream))[:, None]
        bits = _mix(keys ^ _mix(positions.astype(np.uint64)))
    return torch.from_numpy((bits >> np.uint64(11)).astype(np.float64) * 2.0**-53)


def step_uniforms(
    seeds: np.ndarray, roots: np.ndarray, first: int, count: int, stream: Stream
) -> torch.Tensor:
    """Returns uniform numbers that belong to one decode step only.

    If another step used them too, it would decide with numbers that an earlier decision has already
    conditioned on.

    Args:
        seeds: Seed of each request, uint64 or int64 [B].
        roots: Number of tokens committed before the step, int64 [B]; no two steps of a request share it.
        first: Index within the step of the first number.
        count: How many numbers to return.
        stream: Stream to read.

    Returns:
        float64 [B, count] on the CPU.
    """
    return uniforms(seeds, roots[:, None] * _NUMBERS_PER_STEP + np.arange(first, first + count), stream)


def step_uniforms_on_device(
    seeds: torch.Tensor, roots: torch.Tensor, first: int, count: int, stream: Stream
) -> torch.Tensor:
    """Returns what `step_uniforms` does, bit for bit, without the host: its operators can be captured.

    Args:
        seeds: Seed of each request as the int64 of the same bits, [B].
        roots: Number of tokens committed before the step, int64 [B].
        first: Index within the step of the first number.
        count: How many numbers to return.
        stream: Stream to read.

    Returns:
        float64 [B, count] on the device of the arguments.
    """
    if seeds.device.type == "cpu":
        return step_uniforms(seeds.numpy(), roots.numpy(), first, count, stream)
    index = torch.arange(first, first + count, device=seeds.device)
    keys = _mix_signed(_mix_signed(seeds) + int(stream))[:, None]
    bits = _mix_signed(keys ^ _mix_signed(roots[:, None] * _NUMBERS_PER_STEP + index))
    return _shifted(bits, 11).double() * 2.0**-53


def _mix_signed(x: torch.Tensor) -> torch.Tensor:
    """Mixes int64, whose sums and products wrap as those of uint64 do."""
    x = x + _signed(_GAMMA)
    x = (x ^ _shifted(x, 30)) * _signed(_FACTORS[0])
    x = (x ^ _shifted(x, 27)) * _signed(_FACTORS[1])
    return x ^ _shifted(x, 31)


def _shifted(x: torch.Tensor, places: int) -> torch.Tensor:
    """Shifts int64 to the right as if it were unsigned."""
    return (x >> places) & ((1 << (64 - places)) - 1)


def _signed(number: np.uint64) -> int:
    return int(number.astype(np.int64))
