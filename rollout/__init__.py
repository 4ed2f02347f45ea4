"""Paceline's rollout engine: lossless, adaptive speculative decoding on the trainer's own parameters."""

from rollout.api import DistillationTrace, FinishReason, Request, Rollout, RolloutStats, SamplingParams
from rollout.engine import RolloutEngine, StepRecord
from rollout.lengths import LengthEstimate, ObservedLengths
from rollout.model_runner import default_tap_layers
from rollout.requests import EngineBusyError
from rollout.results import mean_acceptance_length
from rollout.strategy import PLAIN, Strategy

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
