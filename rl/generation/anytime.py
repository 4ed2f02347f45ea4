"""Anytime reasoning: cuts thoughts at token budgets, demands an answer at each, and credits both.

AnytimeReasoner (Qi et al., arXiv 2505.13438): rewards become dense, and thinking and answering have
advantages of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from paceline.rl.algorithms.brpo import brpo_advantages
from paceline.rl.config.run import RunConfig
from paceline.rl.tasks.answers import answer_start
from paceline.rl.tasks.prompts import stable_seed
from paceline.rl.tasks.task import Problem
from paceline.rl.types import RankRollouts, TrainingSample
from paceline.rollout import FinishReason, Request, Rollout, RolloutEngine


@dataclass(frozen=True, slots=True)
class Cut:
    """A demanded answer: the index of its sample, the index of its budget, and the decoded answer."""

    sample: int
    level: int
    rollout: Rollout


@dataclass(frozen=True, slots=True)
class AnytimeCredit:
    """The advantages that follow from demanded answers.

    Attributes:
        advantages: The advantage of each token of the step's completions, float32 [L_i].
        answers: The demanded answers as training samples with their advantages.
        accuracy: The mean reward at each budget, and last that of whole completions.
    """

    advantages: list[torch.Tensor]
    answers: list[TrainingSample]
    accuracy: list[float]


class Anytime:
    """Demands answers to cut thoughts and computes the advantages of both.

    Args:
        config: The recipe, with ``length.anytime``.
        tokenizer: The policy's tokenizer.
        engine: The engine that decodes.
    """

    def __init__(self, config: RunConfig, tokenizer: Any, engine: RolloutEngine) -> None:
        assert config.length.anytime is not None
        self._config, self._anytime, self._tokenizer, self._engine = (
            config,
            config.length.anytime,
            tokenizer,
            engine,
        )
        self._marker = "\n" + config.length.answer
        self._marker_ids = list(tokenizer(self._marker, add_special_tokens=False)["input_ids"])

    def demand(self, batch: RankRollouts, step: int) -> tuple[list[int], list[Cut]]:
        """Cuts thoughts that are longer than a budget and samples answers.

        Returns:
            The number of tokens that each completion thought, and the answers.
        """
        thoughts = [
            answer_start(r.token_ids, self._config.length.answer, self._tokenizer) for r in batch.rollouts
        ]
        cuts: list[tuple[int, int]] = []
        requests: list[Request] = []
        for i, (rollout, thought) in enumerate(zip(batch.rollouts, thoughts, strict=True)):
            for level, budget in enumerate(self._anytime.budgets):
                if thought <= budget:
                    break
                prompt = [*rollout.request.prompt_ids, *rollout.token_ids[:budget], *self._marker_ids]
                params = replace(rollout.request.params, max_tokens=self._anytime.answer_tokens)
                for number in range(self._anytime.answers):
                    seed = stable_seed(
                        self._config.seed, step, f"{batch.problems[i].key}/{budget}/{i}", number
                    )
                    requests.append(Request(prompt, params, seed, group=rollout.request.group))
                    cuts.append((i, level))
        answers = self._engine.generate(requests)
        return thoughts, [Cut(i, level, rollout) for (i, level), rollout in zip(cuts, answers, strict=True)]

    def text(self, batch: RankRollouts, cut: Cut, decode: Callable[[Sequence[int]], str]) -> str:
        """Returns the cut thought with its answer, as scorers read it."""
        thought = batch.rollouts[cut.sample].token_ids[: self._anytime.budgets[cut.level]]
        return decode(thought) + self._marker + decode(cut.rollout.token_ids)

    def hand_over(
        self,
        batch: RankRollouts,
        cuts: Sequence[Cut],
        decode: Callable[[Sequence[int]], str],
        score: Callable[[int, Problem, str, Sequence[int]], None],
    ) -> None:
        """Submits the answers for scoring.

        Args:
            batch: The step's completions.
            cuts: The answers that `demand` returned.
            decode: Returns the text of token ids, as scorers read it.
            score: Receives an answer's index, problem, text and token ids.
        """
        for number, cut in enumerate(cuts):
            if cut.rollout.finish_reason is not FinishReason.FAILED:
                thought = batch.rollouts[cut.sample].token_ids[: self._anytime.budgets[cut.level]]
                ids = [*thought, *self._marker_ids, *cut.rollout.token_ids]
                score(number, batch.problems[cut.sample], self.text(batch, cut, decode), ids)

    def credit(
        self,
        batch: RankRollouts,
        thoughts: Sequence[int],
        rewards: Sequence[float],
        cuts: Sequence[Cut],
        scores: Sequence[float],
    ) -> AnytimeCredit:
        """Returns the advantages of thoughts and answers.

        Args:
            batch: The step's completions.
            thoughts: The number of tokens that each completion thought.
            rewards: The reward of each whole completion.
            cuts: The answers that `demand` returned.
            scores: The reward of each answer.
        """
        budgets, size = self._anytime.budgets, self._config.rollout.group_size
        by_place: dict[tuple[int, int], list[float]] = {}
        for cut, score in zip(cuts, scores, strict=True):
            by_place.setdefault((cut.sample, cut.level), []).append(score)
        # a completion that is shorter than a budget keeps its final reward there
        table = torch.tensor(rewards, dtype=torch.float32)[:, None].repeat(1, len(budgets) + 1)
        for (sample, level), of_cut in by_place.items():
            table[sample, level] = sum(of_cut) / len(of_cut)
        weights = torch.tensor(self._anytime.weights or [1.0] * (len(budgets) + 1))
        credits = (
            torch.cat([brpo_advantages(group, weights) for group in table.split(size)])
            if len(table)
            else table
        )
        final = torch.tensor(rewards).view(-1, size)
        answered = (final - final.mean(1, keepdim=True)).flatten().tolist() if len(table) else []
        advantages = []
        for i, rollout in enumerate(batch.rollouts):
            stretch = torch.bucketize(torch.arange(len(rollout.token_ids)), torch.tensor(budgets), right=True)
            each = credits[i][stretch].clone()
            each[thoughts[i] :] = answered[i]
            advantages.append(each)
        return AnytimeCredit(
            advantages, self._answers(cuts, scores, by_place), table.mean(0).tolist() if len(table) else []
        )

    def _answers(
        self, cuts: Sequence[Cut], scores: Sequence[float], by_place: dict[tuple[int, int], list[float]]
    ) -> list[TrainingSample]:
        made = []
        for cut, score in zip(cuts, scores, strict=True):
            of_cut, r = by_place[cut.sample, cut.level], cut.rollout
            if r.finish_reason is FinishReason.FAILED or not r.token_ids:
                continue
            advantage = torch.full((len(r.token_ids),), score - sum(of_cut) / len(of_cut))
            prompt, answer = torch.tensor(list(r.request.prompt_ids)), torch.tensor(r.token_ids)
            made.append(TrainingSample(prompt, answer, torch.tensor(r.logprobs), advantage))
        return made
