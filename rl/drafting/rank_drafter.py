"""One rank's drafter: its traces, its training, and the weights that the rank's engine drafts with."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from transformers import PretrainedConfig, PreTrainedModel

from paceline.drafter_trainer.initialization import initial_drafter, with_mask
from paceline.drafter_trainer.learner import DrafterLearner, first_non_finite
from paceline.drafter_trainer.spot_trainer import LearnerReport, SpotTrainer
from paceline.drafter_trainer.storage.ensemble import EnsembleState
from paceline.drafter_trainer.vocabulary import choose_vocabulary, move_vocabulary
from paceline.rl.config.run import RunConfig
from paceline.rl.drafting.factory import reward_weights, spot_trainer, trace_buffer
from paceline.rl.errors import UserError
from paceline.rl.generation.vllm import VllmRollouts
from paceline.rl.generation.worker import RolloutWorker
from paceline.rl.types import RankRollouts
from paceline.rollout.drafters.eagle3_model import Eagle3Model, eagle3_config
from paceline.rollout.model.runner import ModelRunner


class RankDrafter:
    """Distils the EAGLE-3 drafter on one rank and hands better weights to the rank's engine.

    The drafter does not exist before the first rollouts, which choose its vocabulary, unless `create` is
    given one.

    Args:
        config: The recipe.
        policy: The trainer's unwrapped module, which is the target.
        worker: The rank's engine.
        rank: Index of this process; it decides where traces are spilled and in which order they are visited.
        vllm: The backend that drafts in the engine's place, or None.

    Attributes:
        spot: The drafter's trainer; None until the drafter exists.
        buffer: Traces of recent steps.

    Raises:
        UserError: when the recipe's drafter does not fit the policy.
    """

    def __init__(
        self,
        config: RunConfig,
        policy: PreTrainedModel,
        worker: RolloutWorker,
        rank: int = 0,
        vllm: VllmRollouts | None = None,
    ) -> None:
        self._config, self._policy, self.worker, self._vllm = config, policy, worker, vllm
        self._reward_weight, self._vocabulary_size = (
            config.drafter.reward_weight,
            config.drafter.draft_vocab_size,
        )
        self._wanted = "eagle3" in config.speculation.drafters
        self.buffer = trace_buffer(config, rank)
        self.spot: SpotTrainer | None = None
        if self._wanted:
            try:
                d, taps = config.drafter, worker.tap_layers
                parallel = d.parallel_positions > 0
                self._shape = eagle3_config(policy.config, d.draft_vocab_size, taps, parallel)
            except ValueError as error:
                raise UserError(str(error)) from None

    @property
    def missing(self) -> bool:
        """Whether the recipe wants a drafter and there is none yet."""
        return self._wanted and self.spot is None

    @property
    def learners(self) -> Sequence[DrafterLearner]:
        """The learners of the drafter's trainer; none before there is a drafter."""
        return () if self.spot is None else self.spot.learners

    @property
    def runner(self) -> ModelRunner:
        """Runs the target's forwards in the rank's engine."""
        return self.worker.runner

    @property
    def tap_layers(self) -> tuple[int, ...]:
        """The layers whose inputs the drafter reads."""
        return self.worker.tap_layers

    @property
    def policy_config(self) -> PretrainedConfig:
        """The configuration of the policy."""
        return self._policy.config

    def choose_vocabulary(self, texts: Sequence[Sequence[int]]) -> torch.Tensor:
        """Returns the draft vocabulary that covers most tokens of ``texts``, int64 [D], ascending ids."""
        return choose_vocabulary(texts, self._vocabulary_size, self.worker.runner.vocab_size)

    def create(self, vocabulary: torch.Tensor | None, model: Eagle3Model | None = None) -> SpotTrainer:
        """Builds the drafter and lets the engine draft with it.

        Args:
            vocabulary: int64 [D], the token ids that a new drafter can draft.
            model: A drafter to start from; its own vocabulary is used.

        Returns:
            The drafter's trainer.
        """
        if model is None:
            assert vocabulary is not None
            model = initial_drafter(self._shape, vocabulary, self._policy, self._config.seed)
        parallel = self._config.drafter.parallel_positions > 0
        model = with_mask(model, parallel, self._policy.config, self._config.seed)
        self.spot = spot_trainer(self._config, self._policy, model, self.buffer)
        if self._vllm is None:
            self.worker.add_trained_drafter(self.spot.serving)
        else:  # after a stop, these weights are newer than those that vLLM has loaded
            self._vllm.update_drafter(self.spot.serving)
        return self.spot

    def served(self) -> tuple[Eagle3Model, torch.optim.Optimizer] | tuple[None, None]:
        """Returns the served weights and their optimizer; None for both before there is a drafter."""
        spot = self.spot
        return (None, None) if spot is None else (spot.serving, spot.learner.optimizer)

    def ensemble(self) -> EnsembleState | None:
        """Returns the drafters that are trained side by side; None for a single one."""
        return None if self.spot is None else self.spot.ensemble()

    def learn_from(self, batch: RankRollouts, rewards: Sequence[float], *, same_policy: bool = False) -> None:
        """Adds a step's traces to the buffer.

        Args:
            batch: The step's rollouts.
            rewards: One for each rollout.
            same_policy: Whether the policy's weights are those of the last step.
        """
        if self._vllm is not None and self._wanted:
            self.worker.read_traces(batch)
        self.buffer.begin_step(same_policy)
        self.buffer.add(batch.rollouts, reward_weights(rewards, self._reward_weight))

    def train(self, stop: Callable[[], bool]) -> LearnerReport:
        """Trains on the traces of recent steps until ``stop()``, or until the step's passes are finished."""
        return LearnerReport() if self.spot is None else self.spot.run(stop)

    def serve_approved(self) -> str | None:
        """Lets this rank's engine draft with the weights that this rank alone has approved, see `swap_in`."""
        if self.spot is not None:
            self.spot.adopt([p.detach() for p in self.spot.approved.parameters()])
        return self.swap_in()

    def change_vocabulary(self, vocabulary: torch.Tensor) -> None:
        """Lets the drafter draft other tokens; what it has learned of those that stay is kept.

        Args:
            vocabulary: int64 [D], token ids.
        """
        spot = self.spot
        if spot is None:
            return
        trained = spot.learner.model
        if torch.equal(vocabulary, trained.vocabulary):
            return
        head = self._policy.get_output_embeddings()
        for learner in spot.learners:
            move_vocabulary(learner.model, learner.optimizer, vocabulary, head)
        spot.replace_model()

    def swap_in(self) -> str | None:
        """Lets the engine draft with the weights that are to be served.

        Returns:
            One line when they are unusable, and the engine keeps the old ones; otherwise None.
        """
        if self.spot is None:
            return None
        broken = first_non_finite(self.spot.serving)
        if broken is not None:
            return f"its {broken} has NaN or infinite values: the last good drafter stays in use"
        if self._vllm is not None:
            self._vllm.update_drafter(self.spot.serving)
            return None
        return self.worker.update_trained_drafter(self.spot.serving)
