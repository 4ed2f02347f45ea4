"""The ``length`` section: length-aware rewards, length prediction, and the collapse guard."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class GuardConfig:
    """Watches for a collapse of accuracy or entropy, which length penalties can cause."""

    action: Literal["warn", "stop", "off"] = "warn"
    """Reaction to a collapse: ``warn`` logs one line, ``stop`` ends the run after that step and keeps its
    checkpoint, ``off`` does not look for one."""

    window: int = 5
    """Number of steps that are averaged; at least 1."""

    accuracy_fall: float = 0.5
    """Share of the best window's accuracy whose loss counts as a collapse, in (0, 1]."""

    entropy_floor: float = 0.0
    """Entropy per token, in nats, below which entropy has collapsed; 0 does not check it."""


@dataclass(frozen=True, slots=True)
class AnytimeConfig:
    """Answers to truncated thoughts, for ``update.advantage: brpo`` (AnytimeReasoner, arXiv 2505.13438)."""

    budgets: tuple[int, ...] = (16, 32, 64)
    """Numbers of tokens after which a thought is truncated; ascending, from 1 to below
    ``rollout.max_tokens``."""

    weights: tuple[float, ...] = ()
    """Weight of each budget, and last that of the whole completion; one more than ``budgets``, each above 0.
    Empty weights all alike."""

    answers: int = 2
    """Number of answers sampled at each truncation; at least 2, because they are compared with each other."""

    answer_tokens: int = 12
    """Largest number of tokens of such an answer; at least 1."""


@dataclass(frozen=True, slots=True)
class LengthConfig:
    """Length-aware rewards and what they need.

    configs/length/rewards/ has a recipe for each; docs/length.md says when to use which.
    """

    rewards: tuple[dict[str, Any], ...] = ()
    """Length-aware reward terms, such as ``{name: overlong, cache: 64}``, applied in this order to the task's
    rewards, each at most once: ``l1_exact``, ``l1_max``, ``overlong``, ``target``, ``hbpo``, ``grpo_lambda``,
    ``shorter_better``, ``alp``, ``pear``, ``linear``. The classes in rl/rewards/ document their
    parameters."""

    correct_from: float = 1.0
    """Task reward from which a completion counts as correct, for terms that treat correct ones
    differently."""

    budgets: tuple[int, ...] = ()
    """Numbers of tokens that prompts ask for, each from 1 to ``rollout.max_tokens``; empty asks for none."""

    budget_of: Literal["subgroup", "prompt"] = "subgroup"
    """How ``budgets`` are assigned: ``subgroup`` divides each prompt's samples into one subgroup for each
    budget, so ``rollout.group_size`` must be a multiple of their number; ``prompt`` draws one budget for all
    samples of a prompt."""

    budget_prompt: str = "Think for {budget} tokens."
    """Sentence that is appended to the question if there are ``budgets``; it must contain ``{budget}``."""

    predictor: Literal["observed", "prod_d", "prod_m", "one_shot"] = "observed"
    """Source of the completion lengths that the scheduler expects. ``observed``: means of earlier
    completions. The others are heads on the policy's hidden state at the end of the prompt, trained online
    (ProD, arXiv 2604.07931): ``prod_d`` on the distribution of a group's lengths, ``prod_m`` on their median,
    ``one_shot`` on a single sample, for comparison."""

    quantile: float = 0.9
    """Quantile of the predicted length distribution that the scheduler plans with, in (0, 1). ``prod_m``
    predicts only the median and does not use it."""

    anytime: AnytimeConfig | None = None
    """Truncate thoughts at budgets and train on the answers given there; null does not."""

    answer: str = "Answer:"
    """Text that ends the thinking and begins the answer."""

    guard: GuardConfig = field(default_factory=GuardConfig)
    """Detection of a collapse of accuracy or entropy."""
