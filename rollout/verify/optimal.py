"""How often a verifier can accept, and how often the best one could: for benchmarks and tests, not for
decoding.

All probabilities are those of accepting one of k candidates of one token, for a target distribution p and a
draft distribution q.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import torch

from paceline.rollout.verify.spectr import select_rho

_POINTS = 64
_FULL_SCAN = 512


def chain_acceptance(p: np.ndarray, q: np.ndarray) -> float:
    """Σ min(p, q): one candidate (Leviathan et al., arXiv 2211.17192, theorem 3.5). float64 [V] each."""
    return float(np.minimum(p, q).sum())


def deterministic_acceptance(p: np.ndarray, q: np.ndarray, count: int) -> float:
    """p of the drafter's ``count`` likeliest tokens: candidates that are not drawn."""
    return float(p[np.argsort(-q, kind="stable")[:count]].sum())


def spectr_acceptance(p: np.ndarray, q: np.ndarray, count: int) -> float:
    """Of K-SEQ with ``count`` independent candidates (Sun et al., arXiv 2310.15141, theorem 2)."""
    target, drafter = (torch.from_numpy(np.ascontiguousarray(x, dtype=np.float64))[None] for x in (p, q))
    return float(select_rho(target, drafter, torch.tensor([count]))[1])


def recursive_acceptance(
    p: np.ndarray, q: np.ndarray, count: int, replacement: bool, draws: int = 4096, seed: int = 0
) -> float:
    """Of recursive rejection sampling.

    Exact with replacement, where the residuals are fixed. Without, what is drawn from depends on the
    candidates refused: the mean over ``draws`` sequences of candidates, each with its own probability of
        acceptance.
    """
    if replacement:
        refused = 1.0
        for _ in range(count):
            refused *= 1 - np.minimum(p, q).sum()
            p = _residual(p, q)
        return float(1 - refused)
    generator = np.random.default_rng(seed)
    with np.errstate(divide="ignore"):
        order = np.argsort(-(np.log(q) + generator.gumbel(size=(draws, len(q)))), axis=1)[
            :, : min(count, np.count_nonzero(q))
        ]
    rows = np.arange(draws)
    target, left = np.broadcast_to(p, (draws, len(p))), np.broadcast_to(q, (draws, len(q))).copy()
    missed = np.ones(draws)
    for i, chosen in enumerate(order.T):
        drawn_from = left / np.maximum(left.sum(1, keepdims=True), 1e-300)
        if i + 1 == order.shape[1]:  # the last one's own mean is known
            missed = missed * (1 - np.minimum(target, drawn_from).sum(1))
            break
        missed = missed * (
            1 - np.minimum(1, target[rows, chosen] / np.maximum(drawn_from[rows, chosen], 1e-300))
        )
        target = _residual(target, drawn_from)
        left[rows, chosen] = 0
    return float(1 - missed.mean())


def _residual(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """max(0, p − q) normalised over the last axis; p where nothing is left."""
    rest = np.maximum(p - q, 0)
    total = rest.sum(-1, keepdims=True)
    return np.where(total > 0, rest / np.maximum(total, 1e-300), p)


def optimal_acceptance(p: np.ndarray, q: np.ndarray, count: int, replacement: bool) -> float:
    """The largest probability with which any lossless verifier accepts one of ``count`` candidates.

    The dual of the optimal transport problem (Hu et al., "Towards Optimal Multi-draft Speculative Decoding",
    arXiv 2502.18779; by max-flow min-cut)::

        1 + min over sets of tokens H of  p(H) − P(all candidates lie in H)

    and the minimum is attained on a set that holds the tokens of smallest p/q, so that V + 1 sets suffice.
    Large vocabularies are searched in steps that narrow down on the minimum, which is convex along that
    order.

    Args:
        p, q: float64 [V].
        count: Candidates.
        replacement: Whether they are drawn independently.
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
    if size <= _FULL_SCAN:
        return 1 + min(value(i) for i in range(size + 1))
    low, high = 0, size
    while high - low > 16:
        grid = np.unique(np.linspace(low, high, 17).astype(int))
        best = int(np.argmin([value(i) for i in grid]))
        low, high = int(grid[max(best - 1, 0)]), int(grid[min(best + 1, len(grid) - 1)])
    return 1 + min(value(i) for i in range(low, high + 1))


def _all_inside(q: np.ndarray, size: int, count: int) -> float:
    """P(``count`` tokens drawn without replacement are all among the first ``size``).

    Drawing without replacement is a race of exponential clocks with rates q: all winners are inside exactly
    when ``count`` inside clocks ring before the first outside one, which rings at an exponential time T of
    rate q(outside). So it is E[P(at least ``count`` of independent events of probability 1 − e^{−q(x) T})],
    over u = e^{−q(outside) T} uniform, by Gauss–Legendre quadrature.
    """
    positive = q[:size][q[:size] > 0]
    if len(positive) < count:
        return 0.0
    outside = q[size:].sum()
    if outside <= 0:
        return 1.0
    nodes, weights = np.polynomial.legendre.leggauss(_POINTS)
    # u = s³ spreads the points over late times, where q(outside) is small
    s = (nodes + 1) / 2
    u, jacobian = s**3, 3 * s**2 / 2 * weights
    times = -np.log(u) / outside
    rings = -np.expm1(-np.multiply.outer(times, positive))
    # [times, clocks, count]: the chances that 0, 1, … of a clock's events happen, clocks joined pair by pair
    #     until one is left
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
    """The same by the linear program itself: for small vocabularies, with V^count candidate tuples. Needs
    scipy.

    Maximise Σ π(y, S) over couplings of the token y and the set S of candidates with y ∈ S (Sun et al., arXiv
    2310.15141, section 3)::

        Σ_S π(y, S) ≤ p(y),   Σ_y π(y, S) ≤ P(S)
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
