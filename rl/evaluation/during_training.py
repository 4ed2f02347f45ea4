"""Evaluations within a run: every few steps, the policy on problems that it is not trained on."""

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
    """No completion of any rank has a score; every rank raises it."""


class RunEvaluation:
    """Evaluates the policy with the weights that the run decodes with; every rank takes a share of the
    problems.

    Args:
        config: The recipe, with ``eval_every`` above 0.
        worker: The rank's engine; its sampling parameters are used but for ``evaluation.temperature``.
        decoder: What decodes in the engine's place; None for the engine.
        tokenizer: The policy's.
        read: Token ids of a completion → the text that is scored.
        accelerator: Of this process.
        trained: What the run trains on.

    Attributes:
        best: The highest mean reward so far, None before the first evaluation.
        best_step: The number of steps behind it.

    Raises:
        UserError: when the data has no problems that are not trained on.
    """

    def __init__(
        self,
        config: RunConfig,
        worker: RolloutWorker,
        decoder: Decoder | None,
        tokenizer: Any,
        read: Callable[[list[int]], str],
        accelerator: Accelerator,
        trained: Task,
    ) -> None:
        self._config, self._worker, self._tokenizer, self._read = config, worker, tokenizer, read
        self._decoder: Decoder = worker.engine if decoder is None else decoder
        self._accelerator = accelerator
        self._asked = fitting(
            evaluation_problems(config, config.evaluation.prompts, trained), tokenizer, config
        )
        self._of = repr((config.evaluation, config.task.reward))
        self.best: float | None = None
        self.best_step = 0

    @property
    def origin(self) -> str:
        """What is asked, in words."""
        return f"evaluation: {len(self._asked.problems)} problems, {self._asked.origin}"

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, as JSON."""
        return {"best": self.best, "best_step": self.best_step, "of": self._of}

    def load_state(self, state: dict[str, Any]) -> None:
        """Goes on from what `state` gave. A best of other problems or by another reward is forgotten, as it
        cannot be compared.
        """
        best = state.get("best") if state.get("of") == self._of else None
        self.best, self.best_step = (
            None if best is None else float(best),
            0 if best is None else int(state["best_step"]),
        )

    def run(self, steps_done: int) -> tuple[dict[str, float], bool]:
        """Evaluates. Collective.

        Returns:
            Metrics under ``eval/``, and whether the mean reward is the best so far.

        Raises:
            EvaluationFailed: when no completion of any rank has a score.
        """
        begin = time.monotonic()
        found = gather_object(self._share())
        rewards = [reward for reward, _, _ in found if reward is not None]
        if not rewards:
            raise EvaluationFailed(
                f"evaluation after step {steps_done}: none of the {len(found)} completions has a reward"
            )
        lengths = [length for _, length, _ in found]
        mean = sum(rewards) / len(rewards)
        better = self.best is None or mean > self.best
        if better:
            self.best, self.best_step = mean, steps_done
        return {
            "eval/reward": mean,
            "eval/length": sum(lengths) / len(lengths),
            "eval/truncated": sum(cut for _, _, cut in found) / len(found),
            "eval/unscored": float(len(found) - len(rewards)),
            "time/evaluate": time.monotonic() - begin,
        }, better

    def _share(self) -> list[tuple[float | None, int, bool]]:
        """Reward, length, and whether it was cut, of each completion of this rank."""
        rank, ranks, samples = (
            self._accelerator.process_index,
            self._accelerator.num_processes,
            self._config.evaluation.samples,
        )
        problems = self._asked.problems[rank::ranks]
        rollouts = self._decode([request for problem in problems for request in self._requests(problem)])
        with ScoringPool(self._asked.task, self._asked.seed, samples) as pool:
            for index, rollout in enumerate(rollouts):
                if rollout.finish_reason is not FinishReason.FAILED:
                    pool.add(
                        index, problems[index // samples], self._read(rollout.token_ids), rollout.token_ids
                    )
            scores = pool.collect()
        unscored = scores.unscored
        return [
            (
                None if i in unscored or i not in scores.values else scores.values[i],
                len(r.token_ids),
                r.finish_reason is FinishReason.LENGTH,
            )
            for i, r in enumerate(rollouts)
        ]

    def _requests(self, problem: Any) -> list[Request]:
        params = self._worker.evaluation_params
        prompt = encode_problem(self._tokenizer, problem, self._config.task)
        seeds = [
            stable_seed(self._config.seed, -1, problem.key, sample)
            for sample in range(self._config.evaluation.samples)
        ]
        return [Request(prompt, params, seed, group=("evaluation", problem.key)) for seed in seeds]

    def _decode(self, requests: list[Request]) -> list[Rollout]:
        """Decodes without traces: the drafter is not trained on what the policy is not trained on."""
        engine = self._worker.engine
        collect, engine.collect_traces = engine.collect_traces, False
        try:
            return self._decoder.generate(requests)
        finally:
            engine.collect_traces = collect
