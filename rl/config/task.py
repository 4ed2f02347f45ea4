"""The task section: where problems come from, how they are asked, and how they are scored."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class DatasetConfig:
    """One reasoning-gym data set: its name, its share of the problems, its own parameters, and how difficult
    they make it, on a scale of the recipe's own, for ``task.curriculum``.
    """

    name: str = ""
    weight: float = 1.0
    params: dict[str, Any] = field(default_factory=dict)
    difficulty: float = 0.0


@dataclass(frozen=True, slots=True)
class CurriculumConfig:
    """Problems about as difficult as the policy can bear (AdaRFT): the target rises while the reward is above
    ``reward``.
    """

    start: float = 0.0
    """Difficulty at first."""
    step: float = 1.0
    """The most that it moves in a step (η)."""
    sensitivity: float = 2.0
    """How sharply it follows the reward (α)."""
    reward: float = 0.5
    """Mean reward to keep to (β)."""


@dataclass(frozen=True, slots=True)
class ColumnsConfig:
    """Which columns of a row hold what, where the names are not those that are known by themselves
    (docs/data.md). A dot leads into a column: ``reward_model.ground_truth``.
    """

    prompt: str | None = None
    """Text, or a list of messages."""
    answer: str | None = None
    """The reference answer."""
    difficulty: str | None = None
    """A number, for ``task.curriculum``."""


@dataclass(frozen=True, slots=True)
class RewardConfig:
    """One of several reward functions: ``module:function``, and the weight by which its rewards are
    multiplied.
    """

    reward: str = ""
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class TaskConfig:
    """Where problems come from."""

    source: Literal["reasoning_gym", "jsonl", "parquet", "huggingface"] = "reasoning_gym"
    """``reasoning_gym`` (``datasets``, ``size``), ``jsonl``, ``parquet`` or ``huggingface`` (``path``)."""
    datasets: tuple[DatasetConfig, ...] = ()
    """Mixture of reasoning-gym data sets."""
    size: int = 1000
    """Problems in an epoch, of reasoning-gym's."""
    path: str | None = None
    """JSONL or parquet file; or the directory or id of a Hugging Face data set."""
    split: str = "train"
    """Of a Hugging Face data set."""
    subset: str | None = None
    """Its configuration, such as ``main`` of ``openai/gsm8k``; null where it has only one."""
    columns: ColumnsConfig = field(default_factory=ColumnsConfig)
    """Which columns hold prompt, answer and difficulty."""
    duplicates: Literal["keep", "drop"] = "keep"
    """Rows that repeat another's prompt: ``keep`` asks each as often as it is there, ``drop`` keeps the
    first."""
    heldout: float = 0.0
    """Share of the problems that is never trained on, from 0 to below 1: which ones follows from their
    prompts and the run's seed."""
    curriculum: CurriculumConfig | None = None
    """Chooses problems by difficulty (data sets' ``difficulty``, or a column of that name); null asks all in
    epochs."""
    instruction: str = ""
    """Appended to each question, in a conversation to the user's last turn."""
    system: str | None = None
    """System message, for policies with a chat template, where a row has none; null leaves the template's
    own."""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the chat template, such as ``{enable_thinking: false}``."""
    reward: str | tuple[RewardConfig, ...] | None = None
    """``module:function`` in TRL's reward signature, or a list of ``{reward: module:function, weight: 0.5}``,
    whose weighted rewards are added up; null takes each problem's own scorer."""
    reward_sees_special_tokens: bool = False
    """Whether ``reward`` gets completions with their special tokens, such as those around thoughts; the one
    that ends a completion is left out."""
    score_workers: int = 1
    """Processes of a rank that score."""
    score_seconds: float = 10.0
    """Longest that scoring a completion may take."""
    score_deadline: float = 60.0
    """Longest that a step waits for scores once its rollouts are over, in seconds."""
    score_failed: float = 0.0
    """Reward where scoring took too long or failed."""
    score_memory: float | None = 8.0
    """GB that a scoring process may allocate beyond what it holds once the data is loaded; null sets no
    limit."""
    sandbox: Literal["auto", "require", "off"] = "auto"
    """``auto`` lets scorers neither use the network nor write files, as far as the machine can prevent it,
    and says what it cannot; ``require`` refuses machines that cannot; ``off`` confines nothing, for rewards
    that ask a judge."""
