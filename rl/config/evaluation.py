"""The evaluation section: problems that the run is not trained on."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class EvaluationConfig:
    """Problems that the run is not trained on: from ``path``, else the share that ``task.heldout`` sets
    aside, else others that reasoning-gym makes. They are asked every ``eval_every`` steps, and by ``paceline
    evaluate``.
    """

    path: str | None = None
    """A file or data set of its own, read as ``task`` is; null takes the others."""
    split: str | None = None
    """Of a Hugging Face data set in ``path``, such as ``test``; null takes ``task.split``."""
    prompts: int = 64
    """Problems of an evaluation within the run, at most."""
    samples: int = 1
    """Completions of each."""
    temperature: float | None = None
    """Of these completions; null takes the rollouts', 0 is greedy."""
