"""Acceptance rates of the verifiers and of the best possible one, for benchmarks and tests.

Every rate is the probability that one of k candidates for one token is accepted, for a target distribution p
and a draft distribution q.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import torch

from paceline.rollout.verify.spectr import select_rho

_QUADRATURE_POINTS = 64  # Gauss–Legendre points for the probabilities of drawing without replacement
_FULL_SCAN_VOCABULARY = 512  # up to this size, every one of the V + 1 sets is evaluated


def chain_acceptance(p: np.ndarray, q: np.ndarray) -> float:
    """Returns the acceptance rate of one candidate, Σ min(p, q), for float64 [V] each.

    Leviathan et al., arXiv 2211.17192, theorem 3.5.
    """
    return float(np.minimum(p, q).sum())


def deterministic_acceptance(p: np.ndarray, q: np.ndarray, count: int) -> float:
    """Returns the acceptance rate of candidates that are not drawn.

    The candidates are the drafter's ``count`` likeliest tokens, and the rate is the target's mass on them.
    """
    return float(p[np.argsort(-q, kind="stable")[:count]].sum())


def spectr_acceptance(p: np.ndarray, q: np.ndarray, count: int) -> float:
    """Returns the acceptance rate of K-SEQ with ``count`` independent candidates.

    Sun et al., arXiv 2310.15141, theorem 2.
    """
    target, drafter = (torch.from_numpy(np.ascontiguousarray(x, dtype=np.float64))[None] for x in (p, q))
    return float(select_rho(target, drafter, torch.tensor([count]))[1])


def recursive_acceptance(
    p: np.ndarray, q: np.ndarray, count: int, replacement: bool, draws: int = 4096, seed: int = 0
) -> float:
    """Returns the acceptance rate of recursive rejection sampling.

    With replacement the result is exact, because the residuals are fixed. Without replacement, the
    distribution of a candidate depends on the candidates rejected before it: the result is the mean over
    ``draws`` random sequences of candidates, each with its own acceptance probability.

    Args:
        p: float64 [V], the target's distribution.
        q: float64 [V], the drafter's distribution.
        count: Number of candidates.
        replacement: Whether candidates are drawn independently.
        draws: Number of sampled candidate sequences, without replacement.
        seed: Seed of these samples.
    """
    if replacement:
        rejected = 1.0
        for _ in range(count):
            rejected *= 1 - np.minimum(p, q).sum()
            p = _residual(p, q)
        return float(1 - rejected)
    generator = np.random.default_rng(seed)
    with np.errstate(divide="ignore"):
        order = np.argsort(-(np.log(q) + generator.gumbel(size=(draws, len(q)))), axis=1)[
            :, : min(count, np.count_nonzero(q))
        ]
    rows = np.arange(draws)
    target, left = np.broadcast_to(p, (draws, len(p))), np.broadcast_to(q, (draws, len(q))).copy()
    all_rejected = np.ones(draws)
    for i, chosen in enumerate(order.T):
        drawn_from = left / np.maximum(left.sum(1, keepdims=True), 1e-300)
        if i + 1 == order.shape[1]:  # the last candidate needs no sampling: its mean has a closed form
            all_rejected = all_rejected * (1 - np.minimum(target, drawn_from).sum(1))
            break
        all_rejected = all_rejected * (
            1 - np.minimum(1, target[rows, chosen] / np.maximum(drawn_from[rows, chosen], 1e-300))
        )
        target = _residual(target, drawn_from)
        left[rows, chosen] = 0
    return float(1 - all_rejected.mean())


def _residual(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Returns max(0, p − q), normalised over the last axis; p where nothing is left."""
    rest = np.maximum(p - q, 0)
    total = rest.sum(-1, keepdims=True)
    return np.where(total > 0, rest / np.maximum(total, 1e-300), p)


def optimal_acceptance(p: np.ndarray, q: np.ndarray, count: int, replacement: bool) -> float:
    """Returns the largest probability with which any lossless verifier accepts one of ``count`` candidates.

    This is the dual of the optimal transport problem (Hu et al., "Towards Optimal Multi-draft Speculative
    Decoding", arXiv 2502.18779; by max-flow min-cut)::

        1 + min over sets of tokens H of  p(H) − P(all candidates lie in H)

    The minimum is attained on a set that consists of the tokens of smallest p/q, so that V + 1 sets suffice.
    For large vocabularies the search narrows down on the minimum in steps, which is possible because the
    value is convex along that order.

    Args:
        p: float64 [V], the target's distribution.
        q: float64 [V], the drafter's distribution.
        count: Number of candidates.
        replacement: Whether candidates are drawn independently.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(q > 0, p / q, np.inf)
    order = np.argsort(ratio, kind="stable")
    p, q = p[order], q[order]
    below = np.concatenate([[0.0], np.cumsum(p)])

    def value(size: int) -> float:
        inside = q[:size].sum() ** count if replacement else _all_inside(q, size, count)
        return below[size] - inside

    size = len(p)
    if size <= _FULL_SCAN_VOCABULARY:
        return 1 + min(value(i) for i in range(size + 1))
    low, high = 0, size
    while high - low > 16:
        grid = np.unique(np.linspace(low, high, 17).astype(int))
        best = int(np.argmin([value(i) for i in grid]))
        low, high = int(grid[max(best - 1, 0)]), int(grid[min(best + 1, len(grid) - 1)])
    return 1 + min(value(i) for i in range(low, high + 1))


def _all_inside(q: np.ndarray, size: int, count: int) -> float:
    """Returns P(``count`` tokens drawn without replacement are all among the first ``size``).

    Drawing without replacement is a race of exponential clocks with rates q: all winners are inside exactly
    when ``count`` inside clocks ring before the first outside one, which rings at an exponential time T of
    rate q(outside). So the result is E[P(at least ``count`` of independent events of probability 1 − e^{−q(x)
    T})], over u = e^{−q(outside) T} uniform, by Gauss–Legendre quadrature.
    """
    positive = q[:size][q[:size] > 0]
    if len(positive) < count:
        return 0.0
    outside = q[size:].sum()
    if outside <= 0:
        return 1.0
    nodes, weights = np.polynomial.legendre.leggauss(_QUADRATURE_POINTS)
    # u = s³ places more points at small u, that is, at late times, when q(outside) is small
    s = (nodes + 1) / 2
    u, jacobian = s**3, 3 * s**2 / 2 * weights
    times = -np.log(u) / outside
    rings = -np.expm1(-np.multiply.outer(times, positive))
    # [times, clocks, count]: the probabilities that 0, 1, … of a clock's events happen; clocks are merged in
    # pairs until one is left
    chances = np.zeros((*rings.shape, count))
    chances[..., 0] = 1 - rings
    if count > 1:
        chances[..., 1] = rings
    while (clocks := chances.shape[1]) > 1:
        left, right = chances[:, 0 : clocks - 1 : 2], chances[:, 1:clocks:2]
        joined = np.zeros_like(left)
        for i in range(count):
            joined[..., i:] += left[..., i, None] * right[..., : count - i]
        chances = np.concatenate([joined, chances[:, clocks - clocks % 2 :]], axis=1)
    return float((jacobian * (1 - chances[:, 0].sum(1))).sum())


def optimal_acceptance_lp(p: np.ndarray, q: np.ndarray, count: int, replacement: bool) -> float:
    """Computes `optimal_acceptance` from the linear program itself, for small vocabularies; needs scipy.

    The program has V^count candidate tuples. It maximises Σ π(y, S) over couplings of the token y and the set
    S of candidates with y ∈ S (Sun et al., arXiv 2310.15141, section 3)::

        Σ_S π(y, S) ≤ p(y),   Σ_y π(y, S) ≤ P(S)

    Raises:
        RuntimeError: The solver found no solution.
    """
    from scipy.optimize import linprog

    chances: dict[frozenset[int], float] = {}
    for candidates in itertools.product(range(len(q)), repeat=count):
        if not replacement and len(set(candidates)) < count:
            continue
        chance, left = 1.0, 1.0
        for x in candidates:
            chance *= q[x] / left if left > 0 else 0.0
            left -= 0.0 if replacement else q[x]
        key = frozenset(candidates)
        chances[key] = chances.get(key, 0.0) + chance
    pairs = [(y, i) for i, chosen in enumerate(chances) for y in chosen]
    limits = np.zeros((len(p) + len(chances), len(pairs)))
    for column, (y, i) in enumerate(pairs):
        limits[y, column] = limits[len(p) + i, column] = 1.0
    bound = np.concatenate([p, list(chances.values())])
    solution = linprog(-np.ones(len(pairs)), A_ub=limits, b_ub=bound, method="highs")
    if not solution.success or not math.isfinite(solution.fun):
        raise RuntimeError(f"the linear program was not solved: {solution.message}")
    return float(-solution.fun)
