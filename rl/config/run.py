"""A whole recipe."""

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
    """A recipe."""

    out: str = "runs/run"
    """Directory of the run."""
    seed: int = 0
    """Every random number follows from it."""
    steps: int = 10
    """RL steps."""
    save_every: int = 5
    """Steps between checkpoints (the last step is always saved)."""
    keep_last: int = 1
    """Checkpoints of the last saves to keep; those before the last one are in ``checkpoints/step-N``."""
    keep_best: bool = False
    """Keep the checkpoint of the best evaluation in ``checkpoints/best``."""
    eval_every: int = 0
    """Steps between evaluations, of which the last step always has one; 0 never evaluates."""
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    speculation: SpeculationConfig = field(default_factory=SpeculationConfig)
    update: UpdateConfig = field(default_factory=UpdateConfig)
    length: LengthConfig = field(default_factory=LengthConfig)
    critic: CriticConfig = field(default_factory=CriticConfig)
    drafter: DrafterConfig = field(default_factory=DrafterConfig)
    scale: ScaleConfig = field(default_factory=ScaleConfig)
    measure: MeasureConfig = field(default_factory=MeasureConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)


def to_dict(config: RunConfig) -> dict[str, Any]:
    """Plain data, as it would be written in YAML."""
    return asdict(config)
