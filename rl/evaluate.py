"""A policy on problems it was not trained on: accuracy and length, exactly, and steered to budgets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, LogitsProcessorList, PreTrainedModel

from rl.config import RunConfig
from rl.lengths.guidance import BudgetGuidance, RemainingLength, steps_of, train_remaining, watching
from rl.policies import load_policy
from rl.prompts import encode_problem, stable_seed, stop_token_ids
from rl.tasks import Problem, load_task
from rollout import Request, Rollout, RolloutEngine, SamplingParams, default_tap_layers


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What came of one way of decoding.

    Attributes:
        way: Name; says where it is lossy.
        accuracy: Mean reward.
        length, longest: Tokens: mean, and of the longest.
        completions: How many.
    """

    way: str
    accuracy: float
    length: float
    longest: int
    completions: int


class Evaluator:
    """Holds a policy and problems that were drawn apart from the recipe's.

    Args:
        config: The recipe, for its task and its sampling.
        path: Of the policy.
        prompts: Problems.
        samples: Of each.
    """

    def __init__(self, config: RunConfig, path: Path, prompts: int, samples: int) -> None:
        self._config, self._samples = config, samples
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.policy: PreTrainedModel = load_policy(path, dtype=getattr(torch, config.rollout.dtype)).eval()
        self.problems = load_task(replace(config.task, size=prompts), seed=777).problems
        r = config.rollout
        stops = stop_token_ids(self.tokenizer, self.policy.generation_config)
        self._params = SamplingParams(r.temperature, r.top_k, r.top_p, r.max_tokens, stops)

    def exact(self) -> Evaluation:
        """By the engine: the policy's own distribution."""
        rollouts = self._decode(self.problems)
        scores = [p.score(self._text(r.token_ids)) for p, r in zip(self._owners(self.problems), rollouts, strict=True)]
        return _evaluation("exact", scores, [len(r.token_ids) for r in rollouts])

    def predictor(self, prompts: int) -> RemainingLength:
        """A head of the tokens left, trained on the policy's completions of yet other problems."""
        others = load_task(replace(self._config.task, size=prompts), seed=778).problems
        embeddings: Any = self.policy.get_input_embeddings().weight
        head = RemainingLength(self.policy.config.get_text_config().hidden_size, embeddings)
        train_remaining(head, steps_of(self._decode(others, traces=True)))
        return head

    def steered(self, head: RemainingLength, budget: int, batch: int = 32) -> Evaluation:
        """LOSSY: by transformers' generate, with budget guidance."""
        owners, scores, lengths = self._owners(self.problems), [], []
        torch.manual_seed(0)
        for start in range(0, len(owners), batch):
            part = owners[start : start + batch]
            for problem, ids in zip(part, self._generate([self._prompt(p) for p in part], head, budget), strict=True):
                scores.append(problem.score(self._text(ids)))
                lengths.append(len(ids))
        return _evaluation(f"LOSSY, steered to {budget} tokens", scores, lengths)

    @torch.no_grad()
    def _generate(self, prompts: Sequence[list[int]], head: RemainingLength, budget: int) -> list[list[int]]:
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self._params.stop_token_ids[0]
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

    def _text(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def _decode(self, problems: Sequence[Problem], traces: bool = False) -> list[Rollout]:
        r = self._config.rollout
        engine = RolloutEngine(
            self.policy,
            dtype=getattr(torch, r.dtype),
            max_slots=r.max_slots,
            max_context=r.max_context,
            tap_layers=default_tap_layers(self.policy.config.get_text_config().num_hidden_layers) if traces else (),
            collect_traces=traces,
        )
        owners = self._owners(problems)
        seeds = [stable_seed(0, 0, p.key, i) for i, p in enumerate(owners)]
        return engine.generate([Request(self._prompt(p), self._params, s, group=p.key) for p, s in zip(owners, seeds, strict=True)])


def _evaluation(way: str, scores: Sequence[float], lengths: Sequence[int]) -> Evaluation:
    return Evaluation(way, sum(scores) / len(scores), sum(lengths) / len(lengths), max(lengths), len(scores))
