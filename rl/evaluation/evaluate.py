"""A policy on problems it was not trained on: accuracy and length, exactly, and steered to budgets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LogitsProcessorList, PreTrainedModel

from paceline.rl.config.run import RunConfig
from paceline.rl.errors import UserError
from paceline.rl.evaluation.problems import evaluation_problems, fitting
from paceline.rl.generation.policy_engine import policy_engine
from paceline.rl.lengths.guidance import BudgetGuidance, RemainingLength, steps_of, train_remaining, watching
from paceline.rl.models.policies import load_policy, load_tokenizer
from paceline.rl.rewards.pool import ScoringPool
from paceline.rl.tasks.prompts import encode_problem, scored_text, stable_seed, stop_token_ids
from paceline.rl.tasks.task import Problem, load_task
from paceline.rollout import FinishReason, Request, Rollout, SamplingParams, default_tap_layers


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What came of one way of decoding.

    Attributes:
        way: Name; says where it is lossy.
        accuracy: Mean reward.
        length, longest: Tokens: mean, and of the longest.
        completions: How many.
        unscored: How many of them have no reward; the mean is of the others.
        problem: Why the first of those has none, in one line.
    """

    way: str
    accuracy: float
    length: float
    longest: int
    completions: int
    unscored: int = 0
    problem: str | None = None


class Evaluator:
    """Holds a policy and problems that it was not trained on, sampled, stopped, asked and rewarded as in the
    run.

    Args:
        config: The recipe: its task, its sampling, ``evaluation.path`` and ``evaluation.temperature``.
        path: Directory of the policy.
        prompts: How many problems, at most.
        samples: Completions of each.

    Attributes:
        origin: Where the problems come from, in words.

    Raises:
        UserError: when the data has no problems that are not trained on, or the policy cannot be decoded.
    """

    def __init__(self, config: RunConfig, path: Path, prompts: int, samples: int) -> None:
        self._config, self._samples = config, samples
        self.tokenizer = load_tokenizer(path)
        self.policy: PreTrainedModel = load_policy(path, dtype=getattr(torch, config.rollout.dtype)).eval()
        self._asked = fitting(evaluation_problems(config, prompts), self.tokenizer, config)
        self.problems, self.origin = self._asked.problems, self._asked.origin
        r, temperature = config.rollout, config.evaluation.temperature
        stops = stop_token_ids(self.tokenizer, self.policy.generation_config)
        temperature = r.temperature if temperature is None else temperature
        self._params = SamplingParams(temperature, r.top_k, r.top_p, r.max_tokens, stops, r.stop_strings)

    def exact(self) -> Evaluation:
        """By the engine: the policy's own distribution."""
        rollouts = self._decode(self.problems)
        failed = next((r for r in rollouts if r.finish_reason is FinishReason.FAILED), None)
        if failed is not None:
            raise UserError(f"evaluation: a completion failed: {failed.error}")
        return self._evaluation("exact", [r.token_ids for r in rollouts])

    def _evaluation(self, way: str, completions: Sequence[Sequence[int]]) -> Evaluation:
        """Scores completions in processes of their own, by the recipe's reward.

        Raises:
            UserError: when none of them has a score.
        """
        owners = self._owners(self.problems)
        with ScoringPool(self._asked.task, self._asked.seed, self._samples) as pool:
            pool.wait_ready()
            for index, (problem, ids) in enumerate(zip(owners, completions, strict=True)):
                pool.add(
                    index,
                    problem,
                    scored_text(self.tokenizer, ids, self._config.task, self._params.stop_token_ids),
                    ids,
                )
            scores = pool.collect()
        scored = [value for index, value in scores.values.items() if index not in scores.unscored]
        if not scored:
            raise UserError(f"none of the {len(owners)} completions has a reward: {scores.problem}")
        lengths = [len(ids) for ids in completions]
        unscored = len(owners) - len(scored)
        return Evaluation(
            way,
            sum(scored) / len(scored),
            sum(lengths) / len(lengths),
            max(lengths),
            len(lengths),
            unscored,
            scores.problem,
        )

    def predictor(self, prompts: int) -> RemainingLength:
        """A head of the tokens left, trained on the policy's completions of problems that are trained on, not
        evaluated.
        """
        task = load_task(self._config.task, self._config.seed)
        others = task.batch(0, min(prompts, len(task.rows)))
        embeddings: Any = self.policy.get_input_embeddings().weight
        head = RemainingLength(self.policy.config.get_text_config().hidden_size, embeddings)
        train_remaining(head, steps_of(self._decode(others, traces=True)))
        return head

    def steered(self, head: RemainingLength, budget: int, batch: int = 32) -> Evaluation:
        """LOSSY: by transformers' generate, with budget guidance."""
        owners, completions = self._owners(self.problems), list[list[int]]()
        torch.manual_seed(0)
        for start in range(0, len(owners), batch):
            part = owners[start : start + batch]
            completions += self._generate([self._prompt(p) for p in part], head, budget)
        return self._evaluation(f"LOSSY, steered to {budget} tokens", completions)

    @torch.no_grad()
    def _generate(self, prompts: Sequence[list[int]], head: RemainingLength, budget: int) -> list[list[int]]:
        pad = (
            self.tokenizer.pad_token_id
            if self.tokenizer.pad_token_id is not None
            else self._params.stop_token_ids[0]
        )
        longest = max(map(len, prompts))
        ids = torch.tensor([[pad] * (longest - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
        guidance = BudgetGuidance(head, budget, longest)
        with watching(self.policy, guidance):
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
        return [self._cut(row) for row in out[:, longest:].tolist()]

    def _cut(self, ids: list[int]) -> list[int]:
        """Up to the first stop token, which counts."""
        ends = [i for i, token in enumerate(ids) if token in self._params.stop_token_ids]
        return ids[: ends[0] + 1] if ends else ids

    def _owners(self, problems: Sequence[Problem]) -> list[Problem]:
        return [p for p in problems for _ in range(self._samples)]

    def _prompt(self, problem: Problem) -> list[int]:
        return encode_problem(self.tokenizer, problem, self._config.task)

    def _decode(self, problems: Sequence[Problem], traces: bool = False) -> list[Rollout]:
        r = self._config.rollout
        engine = policy_engine(
            self.policy,
            dtype=getattr(torch, r.dtype),
            max_slots=r.max_slots,
            max_context=r.max_context,
            tap_layers=default_tap_layers(self.policy.config.get_text_config().num_hidden_layers)
            if traces
            else (),
            collect_traces=traces,
            # a stop string may be one
            decode_text=lambda ids: self.tokenizer.decode(ids, skip_special_tokens=False),
        )
        owners = self._owners(problems)
        seeds = [stable_seed(0, 0, p.key, i) for i, p in enumerate(owners)]
        return engine.generate(
            [
                Request(self._prompt(p), self._params, s, group=p.key)
                for p, s in zip(owners, seeds, strict=True)
            ]
        )
