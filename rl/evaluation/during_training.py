"""Evaluates the policy during a run, every few steps, on problems that it is not trained on."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object

from paceline.rl.config.run import RunConfig
from paceline.rl.errors import UserError
from paceline.rl.evaluation.problems import evaluation_problems, fitting
from paceline.rl.generation.worker import RolloutWorker
from paceline.rl.rewards.pool import ScoringPool
from paceline.rl.tasks.prompts import encode_problem, stable_seed
from paceline.rl.tasks.task import Task
from paceline.rollout import FinishReason, Request, Rollout
from paceline.rollout.backends import Decoder


class EvaluationFailed(UserError):
    """Says that no completion of any rank has a score; raised on every rank."""


class RunEvaluation:
    """Evaluates the policy with the weights that the run decodes with; each rank takes some problems.

    Args:
        config: The recipe, with ``eval_every`` above 0.
        worker: The rank's rollout worker; its sampling parameters are used, except for
            ``evaluation.temperature``.
        decoder: Decoder that replaces the worker's engine, or None.
        tokenizer: The policy's tokenizer.
        decode_text: Function from a completion's token ids to the text that is scored.
        accelerator: This process's accelerator.
        trained: Task that the run trains on.

    Attributes:
        best: Highest mean reward so far, None before the first evaluation.
        best_step: Number of steps that were done when it was reached.

    Raises:
        UserError: If the data has no problems that are not trained on.
    """

    def __init__(
        self,
        config: RunConfig,
        worker: RolloutWorker,
        decoder: Decoder | None,
        tokenizer: Any,
        decode_text: Callable[[list[int]], str],
        accelerator: Accelerator,
        trained: Task,
    ) -> None:
        self._config, self._worker, self._tokenizer = config, worker, tokenizer
        self._decode_text = decode_text
        self._decoder: Decoder = worker.engine if decoder is None else decoder
        self._accelerator = accelerator
        self._problems = fitting(
            evaluation_problems(config, config.evaluation.prompts, trained), tokenizer, config
        )
        self._criterion = repr((config.evaluation, config.task.reward))
        self.best: float | None = None
        self.best_step = 0

    @property
    def origin(self) -> str:
        """A description of the problems, for the user."""
        return f"evaluation: {len(self._problems.problems)} problems, {self._problems.origin}"

    def state(self) -> dict[str, Any]:
        """Returns the state that a checkpoint keeps, as JSON values."""
        return {"best": self.best, "best_step": self.best_step, "of": self._criterion}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restores the state that `state` returned.

        A best reward on other problems or by another reward function is dropped, because it cannot be
        compared.
        """
        best = state.get("best") if state.get("of") == self._criterion else None
        self.best, self.best_step = (
            None if best is None else float(best),
            0 if best is None else int(state["best_step"]),
        )

    def run(self, steps_done: int) -> tuple[dict[str, float], bool]:
        """Evaluates the policy. Collective.

        Args:
            steps_done: Number of steps that the policy was trained for.

        Returns:
            Metrics under ``eval/``, and whether the mean reward is the best so far.

        Raises:
            EvaluationFailed: If no completion of any rank has a score.
        """
        begin = time.monotonic()
        outcomes = gather_object(self._evaluate_share())
        rewards = [reward for reward, _, _ in outcomes if reward is not None]
        if not rewards:
            raise EvaluationFailed(
                f"evaluation after step {steps_done}: none of the {len(outcomes)} completions has a reward"
            )
        lengths = [length for _, length, _ in outcomes]
        mean = sum(rewards) / len(rewards)
        is_best = self.best is None or mean > self.best
        if is_best:
            self.best, self.best_step = mean, steps_done
        return {
            "eval/reward": mean,
            "eval/length": sum(lengths) / len(lengths),
            "eval/truncated": sum(truncated for _, _, truncated in outcomes) / len(outcomes),
            "eval/unscored": float(len(outcomes) - len(rewards)),
            "time/evaluate": time.monotonic() - begin,
        }, is_best

    def _evaluate_share(self) -> list[tuple[float | None, int, bool]]:
        """Returns (reward or None, length in tokens, whether truncated) of each completion of this rank."""
        rank, ranks, samples = (
            self._accelerator.process_index,
            self._accelerator.num_processes,
            self._config.evaluation.samples,
        )
        problems = self._problems.problems[rank::ranks]
        rollouts = self._decode([request for problem in problems for request in self._requests(problem)])
        with ScoringPool(self._problems.task, self._problems.seed, samples) as pool:
            for index, rollout in enumerate(rollouts):
                if rollout.finish_reason is not FinishReason.FAILED:
                    text = self._decode_text(rollout.token_ids)
                    pool.add(index, problems[index // samples], text, rollout.token_ids)
            scores = pool.collect()
        return [
            (
                None if index in scores.unscored else scores.values.get(index),
                len(rollout.token_ids),
                rollout.finish_reason is FinishReason.LENGTH,
            )
            for index, rollout in enumerate(rollouts)
        ]

    def _requests(self, problem: Any) -> list[Request]:
        """Returns the requests for a problem's samples."""
        params = self._worker.evaluation_params
        prompt = encode_problem(self._tokenizer, problem, self._config.task)
        seeds = [
            stable_seed(self._config.seed, -1, problem.key, sample)
            for sample in range(self._config.evaluation.samples)
        ]
        return [Request(prompt, params, seed, group=("evaluation", problem.key)) for seed in seeds]

    def _decode(self, requests: list[Request]) -> list[Rollout]:
        """Decodes without collecting traces, so that the drafter does not learn from evaluation problems."""
        engine = self._worker.engine
        collect_traces, engine.collect_traces = engine.collect_traces, False
        try:
            return self._decoder.generate(requests)
        finally:
            engine.collect_traces = collect_traces
