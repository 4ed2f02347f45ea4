"""The speculation section: which drafters, which strategy and which verifier."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class SpeculationConfig:
    """How rollouts are speculated; every choice is lossless."""

    strategy: str = "adaptive"
    """``adaptive``, ``plain``, or one strategy for all steps: ``<drafter>:<depth>`` drafts chains,
    ``<drafter>:<depth>x<width>/<nodes>`` trees of that many nodes, for example ``eagle3:5x4/12``."""
    drafters: tuple[str, ...] = ("suffix", "eagle3", "composite")
    """Which are built; names of `paceline.rollout.drafters.DRAFTERS`."""
    arms: tuple[str, ...] = ()
    """Strategies that ``adaptive`` chooses from; empty takes chains and trees of every drafter."""
    selection: Literal["beg", "thompson"] = "beg"
    """How it chooses: ``beg`` (ε-greedy) or ``thompson``."""
    epsilon: float = 0.02
    """Share of the time that explorations of ``beg`` may lose."""
    max_nodes: int = 16
    """Most draft tokens of a sequence in a verification."""
    tree: Literal["dynamic", "opt_tree", "dyspec", "static"] = "dynamic"
    """Shape of trees: ``dynamic`` (EAGLE-2), ``opt_tree``, ``dyspec`` or ``static``."""
    draw: Literal["likeliest", "replacement", "without_replacement"] = "likeliest"
    """Draft the ``likeliest`` tokens, or draw them, siblings with ``replacement`` or
    ``without_replacement``."""
    verifier: Literal["chain", "block", "recursive", "spectr"] | None = None
    """Of drawn drafts: ``chain``, ``block``, ``recursive`` or ``spectr``; null takes chain for chains and
    recursive for trees. Chains are covered by all; trees by ``recursive``, and those drawn with
    ``replacement`` also by ``spectr``. The ``stand`` drafter always draws siblings without replacement. What
    a verifier does not cover is refused."""
    stop: Literal["fixed", "svip", "specdec"] = "fixed"
    """When chains of model-based drafters end: ``fixed`` (at their depth), ``svip`` or ``specdec``."""
    stop_threshold: float = 0.7
    """Of that rule."""
    tree_gain: float = 0.05
    """Least expected tokens that another level of an ``opt_tree`` must bring."""
    budgets: Literal["uniform", "length_aware"] = "uniform"
    """Draft tokens of the sequences in a batch: ``uniform``, or ``length_aware`` for more where more is left
    to decode."""
    eagle3_window: int | None = None
    """Tokens that the EAGLE-3 drafter attends to at least; null for all."""
    composite_match: int = 5
    """Tokens of a suffix match from which the composite drafter trusts it."""
    clasp_skipped: float = 0.4
    """Layers that CLaSp leaves out, as a share."""
    draft_model: str | None = None
    """Directory or id of the ``draft_model`` drafter's model."""
