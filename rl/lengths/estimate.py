"""Predictions for the engine's scheduler: who is started first, and how much cache is kept for whom."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from paceline.rl.config.length import LengthConfig
from paceline.rl.lengths.predictor import Example, LengthPredictor
from paceline.rl.lengths.statistics import pinball
from paceline.rollout import Request
from paceline.rollout.length_estimate import ObservedLengths

_ENOUGH = 16  # prompts before whose lengths the head's word is not taken


class PredictedLengths:
    """What the head says of prompts that `read` was shown; of others what was observed, as without it.

    Args:
        config: The recipe's length section; its predictor is not ``observed``.
        hidden: Size of the policy's hidden states.
        longest: Most tokens of a completion.
        seed: Of the run.
    """

    def __init__(self, config: LengthConfig, hidden: int, longest: int, seed: int) -> None:
        assert config.predictor != "observed"
        self.head = LengthPredictor(hidden, longest, config.predictor, seed=seed)
        self._quantile = config.quantile
        self._observed = ObservedLengths()
        self._states: dict[tuple[int, ...], torch.Tensor] = {}
        self._predicted: dict[tuple[int, ...], float] = {}

    def read(self, states: Mapping[tuple[int, ...], torch.Tensor]) -> None:
        """Takes prompts' states in, float32 [hidden] each, before their completions are asked for."""
        self._states.update(states)
        if self.head.seen < _ENOUGH or not states:
            return
        values = self.head.quantile(torch.stack(list(states.values())), self._quantile).tolist()
        self._predicted.update(zip(states, values, strict=True))

    def predict(self, request: Request) -> float | None:
        """See `paceline.rollout.length_estimate.LengthEstimate`."""
        predicted = self._predicted.get(tuple(request.prompt_ids))
        return self._observed.predict(request) if predicted is None else predicted

    def observe(self, request: Request, tokens: int) -> None:
        """See `paceline.rollout.length_estimate.LengthEstimate`."""
        self._observed.observe(request, tokens)

    def examples(
        self, groups: Sequence[tuple[tuple[int, ...], Sequence[int]]]
    ) -> tuple[list[dict[str, Any]], list[float]]:
        """What groups that are over teach, as plain data, and what had been predicted of those that had been.

        Args:
            groups: Prompt and lengths of each.
        """
        taught, errors = [], []
        for prompt, lengths in groups:
            state, predicted = self._states.pop(prompt, None), self._predicted.pop(prompt, None)
            if state is not None:
                taught.append({"state": state.tolist(), "lengths": list(lengths)})
            if predicted is not None:
                errors += [
                    pinball(np.array([predicted]), np.array([[length]]), self._quantile) for length in lengths
                ]
        return taught, errors

    def restore(self, path: Path, seen: int) -> bool:
        """Goes on with the head of a checkpoint, or anew where that has none that can be read: only speed
        depends on it.

        Args:
            path: Of its weights.
            seen: Steps that it has learned from.

        Returns:
            Whether there was one.
        """
        try:
            self.head.load_state(load_file(path), seen * _ENOUGH)
        except (OSError, SafetensorError, RuntimeError):
            self.head.seen = 0
            return False
        return True

    def learn(self, taught: Sequence[dict[str, Any]]) -> float:
        """Trains the head on what all ranks' groups taught; ranks that learn the same stay the same."""
        return self.head.learn([Example(torch.tensor(t["state"]), tuple(t["lengths"])) for t in taught])
