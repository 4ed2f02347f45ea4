"""Evaluates a policy on problems that it was not trained on: exactly, and steered to token budgets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import LogitsProcessorList, PreTrainedModel

from paceline.rl.config.run import RunConfig
from paceline.rl.errors import UserError
from paceline.rl.evaluation.problems import evaluation_problems, fitting
from paceline.rl.generation.policy_engine import policy_engine
from paceline.rl.lengths.guidance import (
    BudgetGuidance,
    RemainingLength,
    recording_states,
    token_states,
    train_remaining,
)
from paceline.rl.lengths.statistics import is_loop
from paceline.rl.models.loading import load_policy, load_tokenizer
from paceline.rl.rewards.pool import ScoringPool
from paceline.rl.tasks.prompts import encode_problem, scored_text, stable_seed, stop_token_ids
from paceline.rl.tasks.task import Problem, load_task
from paceline.rollout import FinishReason, Request, Rollout, SamplingParams, default_tap_layers


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The result of one way of decoding.

    Attributes:
        way: Name of the way of decoding; says if it is lossy.
        accuracy: Mean reward of the completions that have one.
        length: Mean length in tokens.
        median: Median length in tokens.
        longest: Length of the longest completion in tokens.
        loops: Number of completions that end in a degenerate loop (`is_loop`).
        completions: Number of completions.
        unscored: Number of completions without a reward.
        problem: Why the first of these has none, in one line; None if all have a reward.
    """

    way: str
    accuracy: float
    length: float
    median: float
    longest: int
    loops: int
    completions: int
    unscored: int = 0
    problem: str | None = None


class Evaluator:
    """Evaluates a policy on problems that it was not trained on, with the run's sampling and rewards.

    Args:
        config: The recipe; its task, its sampling, ``evaluation.path`` and ``evaluation.temperature`` are
            read.
        path: Directory of the policy.
        prompts: Maximum number of problems.
        samples: Number of completions per problem.

    Attributes:
        tokenizer: The policy's tokenizer.
        policy: The policy.
        problems: Problems that are evaluated on.
        origin: Where the problems come from, for the user.

    Raises:
        UserError: If the data has no problems that are not trained on, or the policy cannot be decoded.
    """

    def __init__(self, config: RunConfig, path: Path, prompts: int, samples: int) -> None:
        self._config, self._samples = config, samples
        self.tokenizer = load_tokenizer(path)
        self.policy: PreTrainedModel = load_policy(path, dtype=getattr(torch, config.rollout.dtype)).eval()
        self._source = fitting(evaluation_problems(config, prompts), self.tokenizer, config)
        self.problems, self.origin = self._source.problems, self._source.origin
        rollout, temperature = config.rollout, config.evaluation.temperature
        self._params = SamplingParams(
            rollout.temperature if temperature is None else temperature,
            rollout.top_k,
            rollout.top_p,
            rollout.max_tokens,
            stop_token_ids(self.tokenizer, self.policy.generation_config),
            rollout.stop_strings,
        )

    def exact(self) -> Evaluation:
        """Evaluates completions that the engine samples from the policy's own distribution.

        Raises:
            UserError: If a completion fails, or none has a score.
        """
        rollouts = self._decode(self.problems)
        failed = next((r for r in rollouts if r.finish_reason is FinishReason.FAILED), None)
        if failed is not None:
            raise UserError(f"evaluation: a completion failed: {failed.error}")
        return self._evaluation("exact", [r.token_ids for r in rollouts])

    def _evaluation(self, way: str, completions: Sequence[Sequence[int]]) -> Evaluation:
        """Scores completions in separate processes, by the recipe's reward.

        Args:
            way: Name of the way of decoding.
            completions: Token ids; the completions of a problem are adjacent.

        Raises:
            UserError: If no completion has a score.
        """
        problems = self._repeated(self.problems)
        with ScoringPool(self._source.task, self._source.seed, self._samples) as pool:
            pool.wait_ready()
            for index, (problem, ids) in enumerate(zip(problems, completions, strict=True)):
                text = scored_text(self.tokenizer, ids, self._config.task, self._params.stop_token_ids)
                pool.add(index, problem, text, ids)
            scores = pool.collect()
        rewards = [value for index, value in scores.values.items() if index not in scores.unscored]
        if not rewards:
            raise UserError(
                f"evaluation: none of the {len(problems)} completions has a reward: {scores.problem}"
            )
        lengths = [len(ids) for ids in completions]
        return Evaluation(
            way,
            sum(rewards) / len(rewards),
            sum(lengths) / len(lengths),
            median(lengths),
            max(lengths),
            sum(map(is_loop, completions)),
            len(lengths),
            len(problems) - len(rewards),
            scores.problem,
        )

    def predictor(self, prompts: int) -> RemainingLength:
        """Trains a head that predicts the remaining length, on completions of training problems.

        Args:
            prompts: Maximum number of training problems.
        """
        task = load_task(self._config.task, self._config.seed)
        training_problems = task.batch(0, min(prompts, len(task.rows)))
        embeddings: Any = self.policy.get_input_embeddings().weight
        head = RemainingLength(self.policy.config.get_text_config().hidden_size, embeddings)
        train_remaining(head, token_states(self._decode(training_problems, traces=True)))
        return head

    def steered(self, head: RemainingLength, budget: int, batch: int = 32) -> Evaluation:
        """Evaluates completions of transformers' generate, steered to a budget by budget guidance. LOSSY.

        Args:
            head: Predictor of the remaining length.
            budget: Length to steer to, in tokens.
            batch: Number of completions that are generated together.
        """
        problems, completions = self._repeated(self.problems), list[list[int]]()
        torch.manual_seed(0)
        for start in range(0, len(problems), batch):
            prompts = [self._prompt(problem) for problem in problems[start : start + batch]]
            completions += self._generate(prompts, head, budget)
        return self._evaluation(f"LOSSY, steered to {budget} tokens", completions)

    @torch.no_grad()
    def _generate(self, prompts: Sequence[list[int]], head: RemainingLength, budget: int) -> list[list[int]]:
        """Returns the steered completions of a batch of prompts, as token ids."""
        pad = (
            self.tokenizer.pad_token_id
            if self.tokenizer.pad_token_id is not None
            else self._params.stop_token_ids[0]
        )
        longest = max(map(len, prompts))
        ids = torch.tensor([[pad] * (longest - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
        guidance = BudgetGuidance(head, budget, longest)
        with recording_states(self.policy, guidance):
            generate: Any = self.policy.generate
            out = generate(
                input_ids=ids,
                attention_mask=mask,
                do_sample=True,
                temperature=self._params.temperature,
                top_k=0,
                top_p=1.0,
                max_new_tokens=self._params.max_tokens,
                eos_token_id=list(self._params.stop_token_ids),
                pad_token_id=pad,
                logits_processor=LogitsProcessorList([guidance]),
            )
        return [self._until_stop(row) for row in out[:, longest:].tolist()]

    def _until_stop(self, ids: list[int]) -> list[int]:
        """Returns the token ids up to and including the first stop token."""
        ends = [i for i, token in enumerate(ids) if token in self._params.stop_token_ids]
        return ids[: ends[0] + 1] if ends else ids

    def _repeated(self, problems: Sequence[Problem]) -> list[Problem]:
        """Returns each problem once per completion."""
        return [problem for problem in problems for _ in range(self._samples)]

    def _prompt(self, problem: Problem) -> list[int]:
        """Returns the token ids of a problem's prompt."""
        return encode_problem(self.tokenizer, problem, self._config.task)

    def _decode(self, problems: Sequence[Problem], traces: bool = False) -> list[Rollout]:
        """Samples completions of each problem with the engine, with traces for `predictor` on request."""
        rollout, num_layers = self._config.rollout, self.policy.config.get_text_config().num_hidden_layers
        engine = policy_engine(
            self.policy,
            dtype=getattr(torch, rollout.dtype),
            max_slots=rollout.max_slots,
            max_context=rollout.max_context,
            tap_layers=default_tap_layers(num_layers) if traces else (),
            collect_traces=traces,
            # special tokens are kept, because one of them may be a stop string
            decode_text=lambda ids: self.tokenizer.decode(ids, skip_special_tokens=False),
        )
        return engine.generate(
            [
                Request(
                    self._prompt(problem),
                    self._params,
                    stable_seed(0, 0, problem.key, index),
                    group=problem.key,
                )
                for index, problem in enumerate(self._repeated(problems))
            ]
        )
