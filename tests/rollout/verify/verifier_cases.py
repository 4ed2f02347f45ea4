"""A small Markov process, drafts of every kind for it, and the law that every verifier must keep."""

from __future__ import annotations

import numpy as np
import torch
from scipy import stats

from paceline.rollout.counter_rng import Stream, step_uniforms
from paceline.rollout.sampling import draw
from paceline.rollout.strategy.stop_policy import EntropyThreshold
from paceline.rollout.trees import DraftTree, tree_shape
from paceline.rollout.trees.chain import grow_chain
from paceline.rollout.trees.expander import TreeLimits
from paceline.rollout.trees.ranked import grow_dynamic, grow_opt_tree
from paceline.rollout.trees.sampled import grow_dyspec, grow_static
from paceline.rollout.verify import VERIFIERS, Uniforms, verify_deterministic

VOCAB = 5
LEVELS = 3  # tokens of the joint distribution that is compared
_SPREAD = 1.4


class Process:
    """Target and drafter distributions that depend on the last two tokens; state 0 is the start."""

    def __init__(self, seed: int = 0, narrow: bool = False) -> None:
        g = torch.Generator().manual_seed(seed)
        states = (VOCAB + 1) ** 2
        self.target = torch.softmax(
            torch.randn(states, VOCAB, generator=g, dtype=torch.float64) * _SPREAD, -1
        )
        self.vocabulary = torch.tensor([0, 2, 3]) if narrow else None
        width = 3 if narrow else VOCAB
        self.drafter = torch.softmax(torch.randn(states, width, generator=g) * _SPREAD, -1)

    def joint(self) -> np.ndarray:
        """P(t1, t2, t3): float64 [VOCAB] * 3."""
        first = self.target[0]
        one = torch.arange(VOCAB) + 1
        second = self.target[one]  # states (0, t1)
        third = self.target[one[:, None] * (VOCAB + 1) + one]  # (t1, t2)
        return (first[:, None, None] * second[:, :, None] * third).numpy()


class Chooser:
    """A `Expander` of ``samples`` equal rows over a process."""

    def __init__(self, process: Process, samples: int) -> None:
        self.process = process
        self.vocabulary = process.vocabulary
        self.temperatures = torch.ones(samples)
        self.states = torch.zeros(samples, 1, dtype=torch.long)  # of the root and each expanded node

    def root(self) -> torch.Tensor:
        return self.process.drafter[self.states[:, 0]].log()

    def expand(self, tokens: torch.Tensor, parents: torch.Tensor) -> torch.Tensor:
        above = self.states.gather(1, parents + 1)
        self.states = torch.cat([self.states, after(above, tokens)], 1)
        return self.process.drafter[self.states[:, -tokens.shape[1] :]].log()


def after(states: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """The state after a token: the last two, base VOCAB + 1."""
    return states % (VOCAB + 1) * (VOCAB + 1) + tokens + 1


LIMITS = TreeLimits(depth=2, width=3, nodes=8)

BUILDERS = {
    "chain": lambda c, u: grow_chain(c, 2, u),
    "chain svip": lambda c, u: grow_chain(c, 2, u, stop=EntropyThreshold(1.05)),
    "static with": lambda c, u: grow_static(c, LIMITS, u, replacement=True),
    "static without": lambda c, u: grow_static(c, LIMITS, u, replacement=False),
    "dyspec": lambda c, u: grow_dyspec(c, LIMITS, u),
    "likeliest chain": lambda c, u: grow_chain(c, 2),
    "dynamic": lambda c, u: grow_dynamic(c, LIMITS),
    "opt_tree": lambda c, u: grow_opt_tree(c, LIMITS, gain=0.01),
}

FITTING = [
    ("chain", "chain"),
    ("chain", "block"),
    ("chain", "recursive"),
    ("chain", "spectr"),
    ("chain svip", "chain"),
    ("chain svip", "block"),
    ("static with", "recursive"),
    ("static with", "spectr"),
    ("static without", "recursive"),
    ("dyspec", "recursive"),
    ("likeliest chain", None),
    ("dynamic", None),
    ("opt_tree", None),
]


def run(
    process: Process, tree: str, verifier: str | None, samples: int, seed: int, step: int = 2
) -> tuple[np.ndarray, torch.Tensor]:
    """One verified draft for each sample, then plain draws: counts of (t1, t2, t3), and the accepted lengths
    int64 [samples].
    """
    seeds = np.arange(samples) + seed * samples
    roots = np.full(samples, 7)
    chooser = Chooser(process, samples)
    draft = BUILDERS[tree](
        chooser, lambda first, count: step_uniforms(seeds, roots, first, count, Stream.DRAFT)
    )
    states = node_states(draft, samples)
    probs = process.target[states].float()
    g = torch.Generator().manual_seed(seed)
    target = torch.rand(samples, LEVELS + draft.nodes + 1, dtype=torch.float64, generator=g)
    if draft.probs is None:
        depth = (
            tree_shape(draft.parents)[0]
            if draft.parents is not None
            else torch.arange(1, draft.nodes + 1).expand(samples, -1)
        )
        depth = torch.nn.functional.pad(depth, (1, 0))
        drawn = draw(probs.flatten(0, 1), target.gather(1, depth).flatten()).view(samples, -1)
        outcome = verify_deterministic(drawn, draft)
    else:
        accept = step_uniforms(seeds, roots, 0, draft.nodes, Stream.ACCEPT)
        outcome = VERIFIERS[verifier](probs, draft, Uniforms(target[:, : draft.nodes + 1], accept))
    path = outcome.path.clamp(min=0)
    tokens = draft.tokens.gather(1, path)
    tokens = torch.nn.functional.pad(tokens, (0, LEVELS))
    rows = torch.arange(samples)
    tokens[rows, outcome.accepted] = outcome.next_token
    for level in range(1, LEVELS):  # what is not committed yet is drawn plainly, by numbers of its own
        before = tokens[:, level - 2] + 1 if level > 1 else torch.zeros(samples, dtype=torch.long)
        state = before * (VOCAB + 1) + tokens[:, level - 1] + 1
        fresh = draw(process.target[state].float(), torch.rand(samples, dtype=torch.float64, generator=g))
        tokens[:, level] = torch.where(outcome.accepted >= level, tokens[:, level], fresh)
    counts = np.zeros((VOCAB,) * LEVELS)
    np.add.at(counts, tuple(tokens[:, i].numpy() for i in range(LEVELS)), 1)
    return counts, outcome.accepted


def node_states(draft: DraftTree, samples: int) -> torch.Tensor:
    """int64 [samples, N + 1], the process's state at the root and after each node."""
    states = torch.zeros(samples, draft.nodes + 1, dtype=torch.long)
    for node in range(draft.nodes):
        above = torch.full((samples,), node - 1) if draft.parents is None else draft.parents[:, node]
        states[:, node + 1] = after(states.gather(1, above[:, None] + 1)[:, 0], draft.tokens[:, node])
    return states


def p_value(counts: np.ndarray, joint: np.ndarray) -> float:
    """Chi-square against the exact joint distribution; cells expected fewer than 5 times are pooled."""
    total = counts.sum()
    expected, seen = joint.ravel() * total, counts.ravel()
    rare = expected < 5
    if rare.any():
        expected, seen = (
            np.append(expected[~rare], expected[rare].sum()),
            np.append(seen[~rare], seen[rare].sum()),
        )
    return float(stats.chisquare(seen, expected * total / expected.sum()).pvalue)
