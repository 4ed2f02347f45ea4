"""The length section: how long completions should be, are expected to be, and when that goes wrong."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class GuardConfig:
    """Watches for a collapse of accuracy or entropy, such as length penalties can cause."""

    action: Literal["warn", "stop", "off"] = "warn"
    """``warn`` says it in one line, ``stop`` ends the run after that step with its checkpoint kept, ``off``
    does not look."""
    window: int = 5
    """Steps that are averaged."""
    accuracy_fall: float = 0.5
    """Share of the best window's accuracy whose loss is a collapse."""
    entropy_floor: float = 0.0
    """Entropy of a token, in nats, under which it has collapsed; 0 does not look at it."""


@dataclass(frozen=True, slots=True)
class AnytimeConfig:
    """Answers demanded of cut thoughts (AnytimeReasoner), for ``update.advantage: brpo``."""

    budgets: tuple[int, ...] = (16, 32, 64)
    """Tokens after which thought is cut, ascending."""
    weights: tuple[float, ...] = ()
    """How much each budget counts, and the whole completion after them; empty for all alike."""
    answers: int = 2
    """Drawn at each cut."""
    answer_tokens: int = 12
    """Most tokens of such an answer."""


@dataclass(frozen=True, slots=True)
class LengthConfig:
    """Length-aware rewards and what they read. configs/length/ has a recipe of each; docs/length.md
    says when to take which.
    """

    rewards: tuple[dict[str, Any], ...] = ()
    """Terms by name, with their parameters, applied one after the other to the task's rewards: ``l1_exact``,
    ``l1_max``, ``overlong``, ``target``, ``hbpo``, ``grpo_lambda``, ``shorter_better``, ``alp``, ``pear``,
    ``linear``."""
    correct_from: float = 1.0
    """Task reward from which on a completion counts as correct."""
    budgets: tuple[int, ...] = ()
    """Tokens that completions are asked for; empty asks for none."""
    budget_of: Literal["subgroup", "prompt"] = "subgroup"
    """Whether each ``subgroup`` of a prompt's samples has one of the budgets, or each ``prompt`` draws one
    for all."""
    budget_prompt: str = "Think for {budget} tokens."
    """What is added to the question, with {budget} in it."""
    predictor: Literal["observed", "prod_d", "prod_m", "one_shot"] = "observed"
    """What tells the scheduler how long completions will be: ``observed`` (means of earlier ones), or a head
    on the policy's prompt states, trained online: ``prod_d``, ``prod_m``, ``one_shot``
    (`paceline.rl.lengths.predictor`)."""
    quantile: float = 0.9
    """Of the predicted distribution that is planned with."""
    anytime: AnytimeConfig | None = None
    """Demand answers of cut thoughts, too; null does not."""
    answer: str = "Answer:"
    """Text after which the answer begins, and thinking ends."""
    guard: GuardConfig = field(default_factory=GuardConfig)
    """Against collapse."""
