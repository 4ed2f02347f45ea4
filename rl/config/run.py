"""The recipe: the top-level keys and one attribute for each section."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from paceline.rl.config.critic import CriticConfig
from paceline.rl.config.drafter import DrafterConfig
from paceline.rl.config.evaluation import EvaluationConfig
from paceline.rl.config.length import LengthConfig
from paceline.rl.config.measure import MeasureConfig
from paceline.rl.config.policy import PolicyConfig
from paceline.rl.config.rollout import RolloutConfig
from paceline.rl.config.scale import ScaleConfig
from paceline.rl.config.speculation import SpeculationConfig
from paceline.rl.config.task import TaskConfig
from paceline.rl.config.tracking import TrackingConfig
from paceline.rl.config.update import UpdateConfig


@dataclass(frozen=True, slots=True)
class RunConfig:
    """A recipe.

    Its file may also have the key ``base``: another recipe, relative to the file, whose keys it takes over
    and overrides section by section.
    """

    out: str = "runs/run"
    """Directory of the run."""

    seed: int = 0
    """Seed from which every random number of the run follows, apart from ``policy.warmup.seed``."""

    steps: int = 10
    """Number of RL steps; at least 1."""

    save_every: int = 5
    """RL steps between two checkpoints; at least 1. The last step is always saved."""

    keep_last: int = 1
    """Number of checkpoints to keep; at least 1. With more than 1 they are in ``checkpoints/step-N``, and the
    last one is also in ``checkpoint``."""

    keep_best: bool = False
    """Also keep the checkpoint with the best evaluation, in ``checkpoints/best``; needs ``eval_every``."""

    eval_every: int = 0
    """RL steps between two evaluations, and one after the last step; 0 never evaluates."""

    policy: PolicyConfig = field(default_factory=PolicyConfig)
    """Model that is trained, its precision, and its warm-up."""

    task: TaskConfig = field(default_factory=TaskConfig)
    """Problems and rewards."""

    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    """Sampling of completions."""

    speculation: SpeculationConfig = field(default_factory=SpeculationConfig)
    """Speculative decoding of rollouts."""

    update: UpdateConfig = field(default_factory=UpdateConfig)
    """Algorithm, loss and optimizer."""

    length: LengthConfig = field(default_factory=LengthConfig)
    """Length-aware rewards, length prediction, and the collapse guard."""

    critic: CriticConfig = field(default_factory=CriticConfig)
    """PPO's critic."""

    drafter: DrafterConfig = field(default_factory=DrafterConfig)
    """EAGLE-3 drafter and its training."""

    scale: ScaleConfig = field(default_factory=ScaleConfig)
    """Sharding over ranks, and low-rank adapters."""

    measure: MeasureConfig = field(default_factory=MeasureConfig)
    """Measurements beside the training."""

    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """Problems that the run is not trained on."""

    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """Experiment trackers."""


def to_dict(config: RunConfig) -> dict[str, Any]:
    """Returns the recipe as plain data, as it would be written in YAML."""
    return asdict(config)
