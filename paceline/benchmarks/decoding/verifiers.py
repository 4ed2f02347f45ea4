"""Verifiers on the policy's own distributions: theory, what was measured, the optimum, and acceptance
lengths.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch

from paceline.benchmarks.common.harness import RolloutBench
from paceline.benchmarks.common.results import Keep, ignore
from paceline.rollout import mean_acceptance_length
from paceline.rollout.drafters import DraftRules
from paceline.rollout.trees import DraftKind, DraftTree
from paceline.rollout.verify import VERIFIERS, Uniforms, Verification, Verifier
from paceline.rollout.verify.optimal import (
    chain_acceptance,
    deterministic_acceptance,
    optimal_acceptance,
    recursive_acceptance,
    spectr_acceptance,
)

_DRAWS = 512


@dataclass(frozen=True, slots=True)
class BoundRow:
    """Acceptance of one of k candidates, averaged over nodes the policy met.

    Attributes:
        candidates: k.
        deterministic: Of the drafter's k likeliest tokens, not drawn; its own bound, since nothing accepts
            more of a fixed set.
        with_replacement, without_replacement: Of recursive rejection.
        spectr: Of k-sequential selection.
        bound_with, bound_without: The best that any verifier can reach for candidates drawn so.
    """

    candidates: int
    deterministic: float
    with_replacement: float
    without_replacement: float
    spectr: float
    bound_with: float
    bound_without: float


@dataclass(frozen=True, slots=True)
class VerifierRow:
    """A verifier and tree in the engine.

    Attributes:
        strategy, draw, verifier: What ran.
        nodes: Draft tokens of a verification.
        acceptance_length: Tokens of a sequence a target forward.
        acceptance: Share of drafts whose first level was accepted; with its theory on the same nodes, for
            chains.
    """

    strategy: str
    draw: str
    verifier: str
    nodes: int
    acceptance_length: float
    acceptance: float
    theory: float | None


class Watching:
    """A verifier that notes the first level's distributions and outcomes on its way."""

    def __init__(self, verifier: Verifier, keep: int) -> None:
        self._verifier, self._keep, self._calls = verifier, keep, 0
        self.pairs: list[tuple[np.ndarray, np.ndarray]] = []
        self.overlap = self.accepted = self.seen = 0.0

    def refusal(self, kind: DraftKind, chain: bool) -> str | None:
        return self._verifier.refusal(kind, chain)

    def __call__(self, probs: torch.Tensor, draft: DraftTree, uniforms: Uniforms) -> Verification:
        outcome = self._verifier(probs, draft, uniforms)
        self._calls += 1
        assert draft.probs is not None and draft.vocabulary is not None
        real = draft.lengths > 0
        p, q = probs[:, 0], draft.probs[:, 0]
        ids = draft.vocabulary.expand_as(q) if draft.vocabulary.ndim == 1 else draft.vocabulary[:, 0]
        self.overlap += float(torch.minimum(p.gather(-1, ids), q)[real].sum(dtype=torch.float64))
        self.accepted += float((outcome.accepted[real] > 0).sum())
        self.seen += float(real.sum())
        # one sequence of each step: the first tokens of all would be the easiest
        candidates = real.nonzero()[:, 0].tolist()
        if candidates and len(self.pairs) < self._keep:
            row = candidates[self._calls % len(candidates)]
            rest = 1 - float(p[row, ids[row]].sum(dtype=torch.float64))
            # what the drafter cannot draft is one token of no draft mass: neither verifiers nor bounds tell
            #     it apart
            target = np.append(p[row, ids[row]].double().numpy(), max(rest, 0.0))
            drafter = np.append(q[row].double().numpy(), 0.0)
            self.pairs.append((target / target.sum(), drafter / drafter.sum()))
        return outcome


CASES = (
    ("eagle3:1", "replacement", "chain"),
    ("eagle3:3", "replacement", "chain"),
    ("eagle3:3", "replacement", "block"),
    ("eagle3:6", "replacement", "chain"),
    ("eagle3:6", "replacement", "block"),
    ("eagle3:2x3/6", "replacement", "recursive"),
    ("eagle3:2x3/6", "replacement", "spectr"),
    ("eagle3:2x3/6", "without_replacement", "recursive"),
    ("eagle3:3x4/12", "replacement", "recursive"),
    ("eagle3:3x4/12", "replacement", "spectr"),
    ("eagle3:3x4/12", "without_replacement", "recursive"),
)


def measure_verifiers(
    bench: RolloutBench,
    batch: str,
    pairs: int,
    candidates: tuple[int, ...],
    say: Callable[[str], None],
    keep: Keep = ignore,
) -> tuple[list[VerifierRow], list[BoundRow]]:
    """Every verifier in the engine on one workload, twice over with new seeds; then theory and bounds on
    nodes it met.
    """
    (w,) = bench.workloads((batch,))
    longest = max(r.params.max_tokens for r in w.timed)
    rows: list[VerifierRow] = []
    met: list[tuple[np.ndarray, np.ndarray]] = []
    likeliest = (("eagle3:6", "chain"), ("eagle3:2x3/6", "tree"), ("eagle3:3x4/12", "tree"))
    for strategy, _ in likeliest:
        engine = bench.engine(w.slots, longest, DraftRules(), ("eagle3",))
        engine.use_strategy(strategy)
        rollouts = engine.generate(w.timed)
        steps = [
            (a, d)
            for r in engine.records
            for a, d in zip(r.feedback.accepted, r.feedback.drafted, strict=True)
            if d
        ]
        first = sum(a > 0 for a, _ in steps) / len(steps)
        nodes = max(d for _, d in steps)
        rows.append(
            VerifierRow(
                strategy, "likeliest", "deterministic", nodes, mean_acceptance_length(rollouts), first, None
            )
        )
        keep(rows[-1])
    for strategy, draw, name in CASES:
        engine = bench.engine(w.slots, longest, DraftRules("static", draw), ("eagle3",))
        watching = Watching(VERIFIERS[name], pairs if (name, strategy) == ("chain", "eagle3:1") else 0)
        engine.verify_with(watching)
        engine.use_strategy(strategy)
        rollouts = [
            r for seed in range(2) for r in engine.generate([replace(q, seed=q.seed + seed) for q in w.timed])
        ]
        nodes = max(max(r.feedback.drafted) for r in engine.records)
        theory = watching.overlap / watching.seen if name == "chain" else None
        acceptance = watching.accepted / watching.seen
        rows.append(
            VerifierRow(strategy, draw, name, nodes, mean_acceptance_length(rollouts), acceptance, theory)
        )
        keep(rows[-1])
        met += watching.pairs
        say(
            f"{strategy:<14} {draw:<20} {name:<10} accepted length {rows[-1].acceptance_length:.3f}  first "
            f"level {acceptance:.4f}"
        )
    return rows, list(_bounds(met, candidates))


def _bounds(pairs: list[tuple[np.ndarray, np.ndarray]], candidates: tuple[int, ...]) -> Iterator[BoundRow]:
    for k in candidates:
        values = [
            (
                deterministic_acceptance(p, q, k),
                chain_acceptance(p, q) if k == 1 else recursive_acceptance(p, q, k, True),
                chain_acceptance(p, q) if k == 1 else recursive_acceptance(p, q, k, False, draws=_DRAWS),
                spectr_acceptance(p, q, k),
                optimal_acceptance(p, q, k, True),
                optimal_acceptance(p, q, k, False),
            )
            for p, q in pairs
        ]
        yield BoundRow(k, *(float(np.mean(column)) for column in zip(*values, strict=True)))
