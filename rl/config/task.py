"""The ``task`` section: where problems come from, how they are asked, and how completions are scored."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class DatasetConfig:
    """One reasoning-gym data set of the mixture."""

    name: str = ""
    """Name of the data set in reasoning-gym, such as ``chain_sum``."""

    weight: float = 1.0
    """Share of the problems, relative to the other data sets' weights."""

    params: dict[str, Any] = field(default_factory=dict)
    """Parameters of the data set, such as ``{min_terms: 2, max_terms: 3}``."""

    difficulty: float = 0.0
    """Difficulty of its problems for ``task.curriculum``, on a scale of the recipe's own."""


@dataclass(frozen=True, slots=True)
class CurriculumConfig:
    """A curriculum that asks the problems whose difficulty is nearest to a target (AdaRFT, arXiv 2504.05520).

    After each step T ← T + η tanh(α (mean reward − β)), clipped to the easiest and hardest problem.
    """

    start: float = 0.0
    """First target T, clipped to the problems' difficulties."""

    step: float = 1.0
    """Largest change of the target in a step (η)."""

    sensitivity: float = 2.0
    """How sharply the target follows the reward (α)."""

    reward: float = 0.5
    """Mean reward above which the target rises and below which it falls (β)."""


@dataclass(frozen=True, slots=True)
class ColumnsConfig:
    """Columns of a row, if they do not have one of the names that are recognized (docs/data.md).

    A dot leads into a column: ``reward_model.ground_truth``.
    """

    prompt: str | None = None
    """Column with the prompt, a text or a list of messages; null takes the first recognized name."""

    answer: str | None = None
    """Column with the reference answer; null takes the first recognized name."""

    difficulty: str | None = None
    """Column with a number for ``task.curriculum``; null takes the first recognized name."""


@dataclass(frozen=True, slots=True)
class RewardConfig:
    """One of several reward functions, whose weighted rewards are summed."""

    reward: str = ""
    """Function in TRL's reward signature, as ``module:function``."""

    weight: float = 1.0
    """Factor of its rewards; a finite number."""


@dataclass(frozen=True, slots=True)
class TaskConfig:
    """Where problems come from, how they are asked, and how completions are scored."""

    source: Literal["reasoning_gym", "jsonl", "parquet", "huggingface"] = "reasoning_gym"
    """Origin of the problems: ``reasoning_gym`` generates them (``datasets``, ``size``); ``jsonl``,
    ``parquet`` and ``huggingface`` read them from ``path`` (docs/data.md)."""

    datasets: tuple[DatasetConfig, ...] = ()
    """Mixture of reasoning-gym data sets; at least one with ``source: reasoning_gym``."""

    size: int = 1000
    """Number of problems in an epoch, with ``source: reasoning_gym``; at least
    ``rollout.prompts_per_step``."""

    path: str | None = None
    """JSONL or parquet file, or directory or id of a Hugging Face data set; null with
    ``source: reasoning_gym``."""

    split: str = "train"
    """Split of a Hugging Face data set."""

    subset: str | None = None
    """Configuration of a Hugging Face data set, such as ``main`` of ``openai/gsm8k``; null if it has only
    one."""

    columns: ColumnsConfig = field(default_factory=ColumnsConfig)
    """Columns with prompt, answer and difficulty."""

    duplicates: Literal["keep", "drop"] = "keep"
    """Rows that repeat an earlier prompt: ``keep`` asks them all, since repetition can weight data; ``drop``
    keeps only the first."""

    heldout: float = 0.0
    """Share of the problems that is never trained on, in [0, 1). Which ones depends only on their prompts and
    the run's seed."""

    curriculum: CurriculumConfig | None = None
    """Chooses problems by difficulty (``datasets``' key ``difficulty``, or a column); null asks all in
    epochs."""

    instruction: str = ""
    """Text appended to each question; in a conversation, to the user's last turn."""

    system: str | None = None
    """System message for rows without one, if the policy has a chat template; null leaves the template's
    own."""

    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the chat template, such as ``{enable_thinking: false}``; not those that encoding a
    prompt sets itself."""

    reward: str | tuple[RewardConfig, ...] | None = None
    """Reward function in TRL's signature, as ``module:function``, or a list of
    ``{reward: module:function, weight: 0.5}`` whose weighted rewards are summed; null takes each problem's
    own scorer (docs/rewards.md)."""

    reward_sees_special_tokens: bool = False
    """Keep special tokens, such as those around thoughts, in the completions that ``reward`` gets; the token
    that ends a completion is removed either way."""

    score_workers: int = 1
    """Number of scoring processes of each rank; at least 1."""

    score_seconds: float = 10.0
    """Seconds that scoring one completion may take; above 0. Samples that are scored together share the
    sum."""

    score_deadline: float = 60.0
    """Seconds that a step waits for scores once its rollouts are finished; above 0."""

    score_failed: float = 0.0
    """Reward of a completion whose scoring failed or took too long; a finite number."""

    score_memory: float | None = 8.0
    """Memory, in GB (10⁹ bytes), that a scoring process may allocate beyond what it holds once the data is
    loaded; above 0. Null sets no limit."""

    sandbox: Literal["auto", "require", "off"] = "auto"
    """Confinement of scoring processes: ``auto`` denies them the network and writing files as far as the
    machine can, and logs what it cannot; ``require`` fails on machines that cannot; ``off`` confines nothing,
    for rewards that query a judge (docs/rewards.md)."""
