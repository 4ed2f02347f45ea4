"""Paceline's rollout engine: lossless, adaptive speculative decoding on the trainer's own parameters."""

from rollout.api import DistillationTrace, FinishReason, Request, Rollout, RolloutStats, SamplingParams
from rollout.engine import RolloutEngine, StepRecord, mean_acceptance_length
from rollout.model_runner import default_tap_layers
from rollout.strategy import PLAIN, Strategy

__all__ = [
    "PLAIN",
    "DistillationTrace",
    "FinishReason",
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
