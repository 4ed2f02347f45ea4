"""Length predictions for the engine's scheduler, which decide the admission order and the reserved cache."""

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

_MIN_TRAINED_PROMPTS = 16  # until then the scheduler uses observed means


class PredictedLengths:
    """Predicts lengths by a trained head for prompts given to `read`, and by observed means for all others.

    Args:
        config: The recipe's length section; its predictor must not be ``observed``.
        hidden: Size of the policy's hidden states.
        longest: Maximum number of tokens of a completion.
        seed: Seed of the run.
    """

    def __init__(self, config: LengthConfig, hidden: int, longest: int, seed: int) -> None:
        assert config.predictor != "observed"
        self.head = LengthPredictor(hidden, longest, config.predictor, seed=seed)
        self._quantile = config.quantile
        self._observed = ObservedLengths()
        self._states: dict[tuple[int, ...], torch.Tensor] = {}
        self._predicted: dict[tuple[int, ...], float] = {}

    def read(self, states: Mapping[tuple[int, ...], torch.Tensor]) -> None:
        """Predicts the lengths of prompts from their hidden states, before their completions are requested.

        Args:
            states: float32 [hidden] for each prompt, by its token ids.
        """
        self._states.update(states)
        if self.head.seen < _MIN_TRAINED_PROMPTS or not states:
            return
        values = self.head.quantile(torch.stack(list(states.values())), self._quantile).tolist()
        self._predicted.update(zip(states, values, strict=True))

    def predict(self, request: Request) -> float | None:
        """Predicts a length; see `paceline.rollout.length_estimate.LengthEstimate`."""
        predicted = self._predicted.get(tuple(request.prompt_ids))
        return self._observed.predict(request) if predicted is None else predicted

    def observe(self, request: Request, tokens: int) -> None:
        """Records a length; see `paceline.rollout.length_estimate.LengthEstimate`."""
        self._observed.observe(request, tokens)

    def examples(
        self, groups: Sequence[tuple[tuple[int, ...], Sequence[int]]]
    ) -> tuple[list[dict[str, Any]], list[float]]:
        """Returns training examples of finished groups, and the losses of the predictions made for them.

        Args:
            groups: Token ids of the prompt, and lengths of the completions, of each group.

        Returns:
            Examples as plain data for `learn`, and the pinball loss of each predicted completion.
        """
        examples, errors = [], []
        for prompt, lengths in groups:
            state, predicted = self._states.pop(prompt, None), self._predicted.pop(prompt, None)
            if state is not None:
                examples.append({"state": state.tolist(), "lengths": list(lengths)})
            if predicted is not None:
                errors += [
                    pinball(np.array([predicted]), np.array([[length]]), self._quantile) for length in lengths
                ]
        return examples, errors

    def restore(self, path: Path, seen: int) -> bool:
        """Loads the head from a checkpoint.

        If its weights cannot be read, training starts anew: only speed depends on the head.

        Args:
            path: Path of the head's weights.
            seen: Number of steps that it has been trained for.

        Returns:
            Whether the weights could be read.
        """
        try:
            self.head.load_state(load_file(path), seen * _MIN_TRAINED_PROMPTS)
        except (OSError, SafetensorError, RuntimeError):
            self.head.seen = 0
            return False
        return True

    def learn(self, examples: Sequence[dict[str, Any]]) -> float:
        """Trains the head on the examples of all ranks' groups and returns the mean loss.

        Ranks that train on the same examples keep equal heads.
        """
        return self.head.learn([Example(torch.tensor(t["state"]), tuple(t["lengths"])) for t in examples])
