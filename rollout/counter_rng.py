"""Random numbers as a pure function of (seed, position, stream).

A generator with state would tie a request's numbers to how many draft tokens were verified before; a counter
does not: position 17 of a request sees the same uniform whether it was reached by plain decoding or by
    speculation.
The mixing function is the finalizer of SplitMix64 (Steele, Lea, Flood: "Fast Splittable Pseudorandom Number
Generators", OOPSLA 2014, section 3), applied once for each input.
"""

from __future__ import annotations

import enum

import numpy as np
import torch

_GAMMA = np.uint64(0x9E3779B97F4A7C15)


class Stream(enum.IntEnum):
    """Independent sequences of uniforms of one request."""

    TARGET = 0  # draws a token from the target's (or the residual) distribution
    ACCEPT = 1  # accepts or rejects a draft token
    DRAFT = 2  # draws a token from the drafter's distribution


_STEP_NUMBERS = 1 << 24  # more than one step of one request uses


def reduced_seed(seed: int) -> int:
    """A seed modulo 2^64: what `uniforms` can tell apart."""
    return seed % 2**64


def _mix(x: np.ndarray) -> np.ndarray:
    x = x + _GAMMA
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def uniforms(seeds: np.ndarray, positions: np.ndarray, stream: Stream) -> torch.Tensor:
    """Uniform numbers in [0, 1).

    Args:
        seeds: uint64 or int64 [B], one a request.
        positions: int64 [B, Q], absolute position of the token each number decides.
        stream: Which of the request's sequences.

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
    """Uniform numbers of one decode step, used at no other: a step that decided something with them must not
    lend them to the next.

    Args:
        seeds: uint64 or int64 [B], one a request.
        roots: int64 [B], tokens committed before the step, which no other step of the request shares.
        first, count: Numbers ``first .. first + count - 1`` of the step.
        stream: Which of the request's sequences.

    Returns:
        float64 [B, count] on the CPU.
    """
    return uniforms(seeds, roots[:, None] * _STEP_NUMBERS + np.arange(first, first + count), stream)
