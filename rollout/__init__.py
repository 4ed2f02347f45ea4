"""Paceline's rollout engine: lossless, adaptive speculative decoding on the trainer's own parameters."""

from paceline.rollout.api import (
    DistillationTrace,
    FinishReason,
    Request,
    Rollout,
    RolloutStats,
    SamplingParams,
)
from paceline.rollout.engine.engine import RolloutEngine, StepRecord
from paceline.rollout.engine.request_validation import EngineBusyError
from paceline.rollout.length_estimate import LengthEstimate, ObservedLengths
from paceline.rollout.metrics import mean_acceptance_length
from paceline.rollout.model.runner import default_tap_layers
from paceline.rollout.strategy import PLAIN, Strategy

__all__ = [
    "PLAIN",
    "DistillationTrace",
    "EngineBusyError",
    "FinishReason",
    "LengthEstimate",
    "ObservedLengths",
    "Request",
    "Rollout",
    "RolloutEngine",
    "RolloutStats",
    "SamplingParams",
    "StepRecord",
    "Strategy",
    "default_tap_layers",
    "mean_acceptance_length",
]
