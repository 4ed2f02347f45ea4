"""The ``evaluation`` section: problems that the run is not trained on."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class EvaluationConfig:
    """Problems that the run is not trained on, for ``eval_every`` and ``paceline evaluate``.

    They come from ``path``, else from the share that ``task.heldout`` sets aside, else from reasoning-gym
    with another seed.
    """

    path: str | None = None
    """File or data set of its own, read with the keys of ``task``; null takes held-out or generated
    problems."""

    split: str | None = None
    """Split of a Hugging Face data set in ``path``, such as ``test``; null takes ``task.split``."""

    prompts: int = 64
    """Largest number of problems in an evaluation during the run; at least 1."""

    samples: int = 1
    """Number of completions of each problem; at least 1."""

    temperature: float | None = None
    """Sampling temperature of these completions; 0 is greedy, null takes ``rollout.temperature``."""
