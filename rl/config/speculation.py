"""The ``speculation`` section: drafters, strategies and the verifier of rollouts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class SpeculationConfig:
    """How rollouts are decoded speculatively; every choice is lossless."""

    strategy: str = "adaptive"
    """Strategy of decode steps. ``adaptive`` chooses one for each step by measured speed; ``plain`` does not
    speculate. A fixed strategy is ``<drafter>:<depth>`` for chains or ``<drafter>:<depth>x<width>/<nodes>``
    for trees with that many nodes, for example ``eagle3:5x4/12``."""

    drafters: tuple[str, ...] = ("suffix", "eagle3", "composite")
    """Drafters to build: ``suffix``, ``ngram``, ``consensus``, ``recycling``, ``stand``, ``eagle3``,
    ``parallel`` (``eagle3`` in one pass, with ``drafter.parallel_positions``), ``composite`` (needs
    ``suffix`` and ``eagle3``), ``clasp``, ``draft_model`` (needs ``draft_model``)."""

    arms: tuple[str, ...] = ()
    """Strategies that ``strategy: adaptive`` chooses from, beside plain decoding; empty takes chains and
    trees of several sizes for each drafter."""

    selection: Literal["beg", "thompson"] = "beg"
    """How ``strategy: adaptive`` chooses: ``beg`` is a bucketed ε-greedy bandit (BEG-MAB: TLT, arXiv
    2511.16665), ``thompson`` is Thompson sampling (EESD, arXiv 2406.03853)."""

    epsilon: float = 0.02
    """Share of decoding time, in [0, 1), that ``selection: beg`` may lose by exploring slower strategies."""

    max_nodes: int = 16
    """Largest number of draft tokens of a sequence in one verification, from 1 to 63."""

    tree: str = "dynamic"
    """Construction of trees by model-based drafters: ``dynamic`` (EAGLE-2, arXiv 2406.16858) and ``opt_tree``
    (OPT-Tree, arXiv 2406.17276) need ``draw: likeliest``, ``dyspec`` (DySpec, arXiv 2410.11744) needs
    ``draw: without_replacement``, and ``static``, whose shape is fixed, one of the two sampled draws."""

    draw: Literal["likeliest", "replacement", "without_replacement"] = "likeliest"
    """How model-based drafters choose tokens: the ``likeliest`` ones, or sampled from their distribution,
    siblings with ``replacement`` or ``without_replacement``."""

    verifier: str | None = None
    """Verifier of sampled drafts: ``chain``, ``block``, ``recursive`` or ``spectr``. All verify chains;
    ``recursive`` also verifies trees, and ``spectr`` those whose siblings are drawn with replacement, which
    the ``stand`` drafter never does. A combination that would change the distribution is an error. Null takes
    ``chain`` for chains and ``recursive`` for trees; likeliest drafts need none."""

    stop: Literal["fixed", "svip", "specdec"] = "fixed"
    """When chains of model-based drafters end: ``fixed`` at the strategy's depth; earlier by ``svip``, the
    entropy of the draft distribution (SVIP, arXiv 2411.18462), or ``specdec``, the predicted rejection
    probability (SpecDec++, arXiv 2405.19715)."""

    stop_threshold: float = 0.7
    """Threshold above which a chain ends: with ``stop: svip`` the square root of the draft entropy in nats,
    with ``stop: specdec`` the probability that any of its tokens is rejected."""

    tree_gain: float = 0.05
    """Least gain in expected accepted tokens for which an ``opt_tree`` grows another level."""

    budgets: Literal["uniform", "length_aware"] = "uniform"
    """Distribution of draft tokens over the sequences of a batch: ``uniform``, or ``length_aware``, which
    gives twice as many to the quarter with the longest expected remainder and two thirds to the others (DAS,
    arXiv 2511.13841)."""

    eagle3_window: int | None = None
    """Least number of preceding tokens that the EAGLE-3 drafter attends to beside the first four of the text,
    which bounds its KV cache; at least 1. Null attends to all."""

    composite_match: int = 5
    """Length of a suffix match, in tokens, from which the ``composite`` drafter takes the suffix drafter's
    proposal instead of the model's (SAM-Decoding, arXiv 2411.10666)."""

    clasp_skipped: float = 0.4
    """Share of the policy's layers that the ``clasp`` drafter skips (CLaSp, arXiv 2505.24196)."""

    draft_model: str | None = None
    """Directory or Hugging Face id of the ``draft_model`` drafter's model."""
